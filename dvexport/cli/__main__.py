"""`python -m dvexport.cli`: the same as `python -m dvexport`."""

from dvexport.__main__ import start

__all__: list[str] = []

if __name__ == "__main__":
    start()
