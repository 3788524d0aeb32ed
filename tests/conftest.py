"""Found by every test below this folder, which puts the folder's plain helper modules on the import path."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
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


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of 64 KiB, or none; unmounted afterwards."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=64k,mode=0700", *options]), "tmpfs", place]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("disks can't be mounted here")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True, check=False)
