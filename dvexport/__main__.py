"""`python -m dvexport`: the command line, where the script is not on the path."""

import os
import sys

__all__ = ["start"]


def start() -> None:
    """Run the command line without the working folder on the path, where Python's `-m` puts it first.

    It may be a stranger's folder: none of its modules is to stand in for one of ours, or for one that ours import.
    """
    if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    from dvexport.cli import main

    main()


if __name__ == "__main__":
    start()
