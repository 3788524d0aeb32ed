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

# One folder for a run: its processes share what tests export, and a list of their own of what was made here, not the
# user's. The first process makes it; those that it starts find it in their environment.
if "PYTEST_XDIST_WORKER" not in os.environ:
    folder = tempfile.mkdtemp(prefix="dvexport-tests-")
    os.environ["DVEXPORT_TESTS"] = folder
    os.environ["DVEXPORT_STATE"] = os.path.join(folder, "state")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
