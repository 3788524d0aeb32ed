"""The cache of kernels: what is damaged is made anew, what others may write to is not used; trouble costs time."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cache_folder import DATA, KEY, OTHER, WHOLE, Maker, as_root, ask, kept

from dvexport.own_folder import refusal
from dvexport.targets.tvm.build import cache, cache_files

NOBODY = 65534


def notes(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dvexport"]


def test_what_is_made_once_is_kept_for_the_user_alone(folder, caplog):
    assert ask(Maker(), times=3) == 1
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "v2", kept(folder))] == [
        0o700, 0o700, 0o600,
    ]  # fmt: skip
    assert ask(Maker(b""), key=OTHER) == 1
    assert ask(Maker(b""), key=OTHER) == 0
    assert [path.name for path in (folder / "v2").iterdir() if path.name.startswith(".")] == []
    assert notes(caplog) == []


def flip(at: int):
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "of no head": lambda data: data[:20],
    "a head alone": lambda data: data[:56],
    "half": lambda data: data[: WHOLE // 2],
    "one byte short": lambda data: data[:-1],
    "one byte long": lambda data: data + b"\0",
    "garbage": lambda data: os.urandom(len(data)),
    "short garbage": lambda data: b"garbage",
    "zeros": lambda data: bytes(len(data)),
    "half zeros": lambda data: data[: WHOLE // 2] + bytes(WHOLE - WHOLE // 2),
    "the content alone": lambda data: data[56:],
    "an endless size": lambda data: data[:16] + b"\xff" * 8 + data[24:],
    **{f"a bit of byte {at}": flip(at) for at in (0, 15, 16, 23, 24, 55, 56, 1000, WHOLE - 1)},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_made_anew_and_replaced(folder, caplog, damage):
    ask(Maker())
    good = kept(folder).read_bytes()
    assert len(good) == WHOLE
    kept(folder).write_bytes(damage(good))
    assert ask(Maker()) == 1
    assert kept(folder).read_bytes() == good
    assert ask(Maker()) == 0
    assert notes(caplog) == []


def test_an_entry_that_is_too_large_is_not_read(folder):
    path = folder / "v2" / f"kernel-{KEY}"
    assert cache.cached("kernel", KEY, Maker()) == DATA
    size = 1 << 40  # holes: no disk is full of it, and memory would be
    with path.open("r+b") as stream:
        stream.write(cache_files._HEAD.pack(cache_files._MAGIC, size, bytes(32)))
    os.truncate(path, cache_files._HEAD.size + size)
    assert cache.cached("kernel", KEY, Maker()) == DATA
    assert path.stat().st_size == cache_files._HEAD.size + len(DATA)


def test_an_entry_under_the_name_of_another_does_not_match(folder):
    ask(Maker())
    ask(Maker(b"other"), key=OTHER)
    kept(folder, OTHER).replace(kept(folder))
    assert ask(Maker()) == 1


def test_an_entry_that_is_no_plain_file_is_not_read(folder, tmp_path, caplog):
    ask(Maker())
    kept(folder).rename(tmp_path / kept(folder).name)
    kept(folder).symlink_to(tmp_path / kept(folder).name)
    assert ask(Maker()) == 1
    assert not kept(folder).is_symlink()
    kept(folder).unlink()
    os.mkfifo(kept(folder))
    assert (ask(Maker()), ask(Maker())) == (1, 0)
    assert notes(caplog) == []
    kept(folder).unlink()
    kept(folder).mkdir()
    (kept(folder) / "mine").write_text("")
    assert ask(Maker(), times=2) == 2
    assert (kept(folder) / "mine").exists()
    (note,) = notes(caplog)
    assert "what was compiled can't be kept" in note


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_an_entry_that_others_may_write_is_not_read(folder, mode):
    ask(Maker())
    kept(folder).chmod(mode)
    assert ask(Maker()) == 1
    assert stat.S_IMODE(kept(folder).stat().st_mode) == 0o600


@as_root
def test_an_entry_of_another_user_is_not_read(folder):
    ask(Maker())
    os.chown(kept(folder), NOBODY, NOBODY)
    assert ask(Maker()) == 1
    assert kept(folder).stat().st_uid == os.geteuid()


def refused(folder: Path, caplog) -> str:
    """Ask three times of a cache that is not used, and return what was said of it, once."""
    cache._seen.clear()  # a process looks at a folder once
    before = sorted(folder.parent.rglob("*"))
    assert ask(Maker(), times=3) == 3
    assert sorted(folder.parent.rglob("*")) == before
    (note,) = notes(caplog)
    assert note.startswith("note: the kernel cache is not used, which costs time and nothing else: ")
    assert note.endswith("; $DVEXPORT_CACHE may name another folder")
    assert cache.trouble() in note
    assert cache.entries() == []
    return note


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
@pytest.mark.parametrize("name", ["", "v2"])
def test_a_folder_that_others_may_write_is_not_used(folder, caplog, mode, name):
    ask(Maker())
    (folder / name).chmod(mode)
    assert f"others may write to {folder / name} (its mode is {mode:o}; chmod go-w makes it yours)" in refused(
        folder, caplog
    )
    (folder / name).chmod(mode & ~0o022)
    assert ask(Maker()) == 0


def test_a_folder_where_others_may_put_another_is_not_used(folder, caplog):
    ask(Maker())
    folder.parent.chmod(0o777)
    assert f"others may write to {folder.parent} " in refused(folder, caplog)
    folder.parent.chmod(0o1777)
    assert ask(Maker()) == 0


def test_a_folder_that_others_may_read_is_closed(folder, caplog):
    ask(Maker())
    (folder / "v2").chmod(0o755)
    assert ask(Maker()) == 0
    assert stat.S_IMODE((folder / "v2").stat().st_mode) == 0o700
    assert notes(caplog) == []


@as_root
@pytest.mark.parametrize("name", ["", "v2"])
def test_a_folder_of_another_user_is_not_used(folder, caplog, name):
    ask(Maker())
    os.chown(folder / name, NOBODY, NOBODY)
    assert f"{folder / name} belongs to the user " in refused(folder, caplog)


@as_root
def test_a_folder_below_that_of_another_user_is_not_used(folder, caplog):
    ask(Maker())
    os.chown(folder.parent, NOBODY, NOBODY)
    assert f"{folder.parent} belongs to the user " in refused(folder, caplog)


def test_symbolic_links_lead_to_what_is_checked(folder, tmp_path, caplog, monkeypatch):
    good, bad = tmp_path / "good", tmp_path / "bad"
    for place, mode in ((good, 0o700), (bad, 0o777)):
        place.mkdir()
        (place / "cache").mkdir()
        place.chmod(mode)
    folder.symlink_to(Path("bad") / "cache")
    assert f"others may write to {bad} " in refused(folder, caplog)
    folder.unlink()
    folder.symlink_to(good / "cache")
    assert ask(Maker(), times=2) == 1
    assert (good / "cache" / "v2" / f"kernel-{KEY}").is_file()
    folder.unlink()
    folder.symlink_to(folder)
    assert "too many symbolic links" in str(cache.trouble())
    folder.unlink()
    folder.symlink_to(good / "missing")
    monkeypatch.setattr(cache, "_said", set())
    assert ask(Maker()) == 1


@as_root
def test_a_symbolic_link_of_another_user_is_not_followed(folder, tmp_path, caplog):
    (tmp_path / "good").mkdir(0o700)
    folder.symlink_to(tmp_path / "good")
    os.lchown(folder, NOBODY, NOBODY)
    assert f"{folder} belongs to the user " in refused(folder, caplog)


def test_a_file_in_place_of_a_folder(folder, caplog):
    folder.write_text("mine")
    assert f"{folder} is no folder" in refused(folder, caplog)
    assert folder.read_text() == "mine"


@as_root
def test_a_user_who_may_not_write_loses_only_time(folder, monkeypatch, caplog):
    """Root's folders are not another user's own, and it can't make one in them, or look into closed ones."""
    closed, opened = folder / "cache", Path(tempfile.mkdtemp(prefix="dvexport-tests-"))
    folder.mkdir(0o700)
    opened.chmod(0o755)
    (opened / "empty").mkdir(0o755)
    try:
        for place in (closed, opened / "empty", opened / "missing" / "cache"):
            monkeypatch.setenv(cache.VARIABLE, str(place))
            made, said = as_nobody(lambda: (ask(Maker(), times=3), notes(caplog)))
            assert made == 3
            (note,) = said
            assert "the kernel cache is not used" in note
            assert "Permission denied" in note or "belongs to the user root" in note
        assert [path.name for path in opened.rglob("*")] == ["empty"]
    finally:
        shutil.rmtree(opened)


def as_nobody(function) -> Any:
    """Return what `function` returns in a process of another user: the modules that it needs are loaded already."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(writer, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        data = stream.read()
    os.waitpid(child, 0)
    return json.loads(data)


@as_root
def test_a_full_disk_costs_time_and_heals(folder, small_disk, monkeypatch, caplog):
    disk = small_disk()
    monkeypatch.setenv(cache.VARIABLE, str(disk / "cache"))
    assert ask(Maker()) == 1
    filler = disk / "filler"
    free = os.statvfs(disk)
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize))
    assert ask(Maker(), times=3, key=OTHER) == 3
    assert ask(Maker()) == 0
    (note,) = notes(caplog)
    assert f"No space left on device (the cache is {disk / 'cache'})" in note
    assert [path.name for path in (disk / "cache" / "v2").iterdir()] == [f"kernel-{KEY}"]
    filler.unlink()
    assert ask(Maker(), times=2, key=OTHER) == 1


@as_root
def test_a_disk_for_reading_only_is_read(folder, small_disk, monkeypatch, caplog):
    disk = small_disk()
    monkeypatch.setenv(cache.VARIABLE, str(disk / "cache"))
    ask(Maker())
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    monkeypatch.setattr(cache, "_seen", {})
    assert ask(Maker()) == 0
    assert ask(Maker(), times=2, key=OTHER) == 2
    (note,) = notes(caplog)
    assert "Read-only file system" in note
    monkeypatch.setenv(cache.VARIABLE, str(disk / "new"))
    assert ask(Maker()) == 1
    assert "the kernel cache is not used" in notes(caplog)[1]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_folder() == tmp_path / ".cache" / "dvexport"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "dvexport"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.VARIABLE, "here")
    assert cache.cache_folder() == tmp_path / "here"


@pytest.mark.parametrize("home", ["missing", ""])
def test_without_a_home_nothing_is_made(folder, monkeypatch, tmp_path, caplog, home):
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / home) if home else "relative")
    assert cache.cache_folder() is None
    assert "there is no home folder" in refused(folder, caplog)


def test_the_names_of_kinds_are_told_apart():
    with pytest.raises(AssertionError):
        cache_files.entry_name("other", KEY)
    with pytest.raises(AssertionError):
        cache_files.entry_name("kernel", "../" + KEY[3:])


def test_a_note_is_a_line_in_plain_words(folder):
    """As the command line shows it: no logging is set up there."""
    folder.write_text("")
    code = f"from dvexport.targets.tvm.build import cache; cache.cached('kernel', {KEY!r}, lambda: b'')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == (
        "note: the kernel cache is not used, which costs time and nothing else: "
        f"{folder} is no folder; $DVEXPORT_CACHE may name another folder\n"
    )
    assert logging.getLogger("dvexport").handlers == []


def test_what_is_missing_is_nobodys(tmp_path):
    assert refusal(tmp_path / "missing" / "folder") is None
