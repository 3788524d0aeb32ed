"""`python -m dvexport`: the command line, where the script is not on the path."""

from dvexport.launch import drop_working_folder

drop_working_folder()

from dvexport.cli import main  # noqa: E402  # what it imports must not come from the working folder

__all__: list[str] = []

if __name__ == "__main__":
    main()
