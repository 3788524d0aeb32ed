"""Writing a file whole or not at all, and into what is no file."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from dvexport.errors import UsageError
from dvexport.files import atomic_write, writable_output


def write(path, content=b"new"):
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_half(path, error):
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise error


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.dvx"
    path.write_bytes(b"old")
    with pytest.raises(UsageError, match="the disk is full"):
        write_half(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.dvx"]


def test_a_full_disk(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with (
        pytest.raises(UsageError) as caught,
        atomic_write(tmp_path / "a"),
        open("/dev/full", "wb", 0) as full,
    ):
        full.write(b"x")
    assert "the disk is full" in str(caught.value)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    for path, why in (
        (tmp_path / "none" / "a.dvx", "does not exist"),
        (tmp_path / "file" / "a.dvx", "not a folder"),
        (tmp_path, "it is a folder"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(UsageError, match=why):
            writable_output(path)
    assert writable_output(tmp_path / "new.dvx") == tmp_path / "new.dvx"
    assert not (tmp_path / "new.dvx").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="not writable"):
        writable_output(tmp_path / "a.dvx")


def test_an_error_about_another_file_is_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        open(tmp_path / "other").close()


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    for name, target in (("link", "real"), ("dangling", "fresh")):
        link = tmp_path / name
        link.symlink_to(target)
        write(link)
        assert link.is_symlink()
        assert (tmp_path / target).read_bytes() == b"new"
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UsageError, match="leads back to itself"):
        writable_output(tmp_path / "round")
    assert {path.name for path in tmp_path.iterdir()} == {"real", "fresh", "link", "dangling", "round"}


def test_permissions_are_kept(tmp_path):
    path = tmp_path / "secret.json"
    path.touch()
    for mode in (0o600, 0o440):
        path.chmod(mode)
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


def test_a_device_stays_a_device(tmp_path):
    link = tmp_path / "nothing"
    link.symlink_to(os.devnull)
    for path in (Path(os.devnull), link):
        assert writable_output(path) == path
        write(path)
        assert stat.S_ISCHR(path.stat().st_mode)
    if os.path.exists("/dev/full"):
        with pytest.raises(UsageError, match="the disk is full"):
            write(Path("/dev/full"))


def test_a_pipe_gets_the_content(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert writable_output(pipe) == pipe, "nobody has to read yet"
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write(pipe, b"x" * 200_000)  # more than a pipe holds
    reader.join(timeout=10)
    assert read == [b"x" * 200_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["n" * 255, "n" * 251 + ".dvx", "a." + "n" * 253, "\u00fc" * 127], ids=len)
def test_the_longest_legal_names(tmp_path, name):
    write(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"new"


def test_a_name_with_a_nul(tmp_path):
    with pytest.raises(UsageError, match="NUL"):
        writable_output(f"{tmp_path}/a\0b")
