"""Found by every test below this folder, which puts the folder's plain helper modules on the import path."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from hypothesis import settings

# Examples are the same in every run, and a slow machine is no failure.
settings.register_profile("dvexport", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("dvexport")

# What tests export is remembered as made here by a list of their own, not the user's.
os.environ["DVEXPORT_STATE"] = tempfile.mkdtemp(prefix="dvexport-tests-")
atexit.register(shutil.rmtree, os.environ["DVEXPORT_STATE"], ignore_errors=True)
