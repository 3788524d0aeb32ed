"""`python -m dvexport.cli`: the same as `python -m dvexport`."""

from dvexport.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
