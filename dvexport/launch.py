"""What happens before anything else is imported."""

from __future__ import annotations

import os
import sys

__all__ = ["drop_working_folder"]


def drop_working_folder() -> None:
    """Take the working folder off the path, where Python's `-m` puts it first.

    It may be a stranger's folder: none of its modules is to stand in for one of ours.
    """
    if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
