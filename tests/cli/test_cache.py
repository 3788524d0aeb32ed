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
import time
from pathlib import Path
from typing import Any

import pytest

from dvexport.cli import main
from dvexport.own_folder import refusal
from dvexport.targets.tvm.build import cache, cache_files

KEY, OTHER = "0" * 64, "1" * 64
DATA = bytes(range(256)) * 8
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user, or mounts a small disk")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder for the cache that does not exist yet, and a process that has said and seen nothing."""
    tmp_path.chmod(0o755)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    for name, nothing in (("_said", set()), ("_tidied", set()), ("_seen", {})):
        monkeypatch.setattr(cache, name, nothing)
    return tmp_path / "cache"


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


class Maker:
    """Makes the same bytes every time, and counts how often it is asked."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data, self.calls = data, 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.data


def kept(folder: Path, key: str = KEY) -> Path:
    return folder / "v2" / f"kernel-{key}"


def ask(make: Maker, times: int = 1, key: str = KEY) -> int:
    """Ask for an entry and return how often it was made."""
    before = make.calls
    for _ in range(times):
        assert cache.cached("kernel", key, make) == make.data
    return make.calls - before


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


WHOLE = 56 + len(DATA)
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


def test_older_formats_and_unfinished_entries_are_removed(folder):
    now, old = time.time(), time.time() - 7200
    mine = make_older(folder)
    ask(Maker())
    begun, killed, lost = (
        folder / "v2" / name
        for name in (f".kernel-{KEY}.{'0' * 16}", f".library-{KEY}.{'1' * 16}", f".zig-{KEY}.{'2' * 16}.d")
    )
    for path, at in ((begun, now), (killed, old)):
        path.write_bytes(b"x")
        os.utime(path, (at, at))
    lost.mkdir()
    (lost / "o").write_text("x")
    os.utime(lost, (old, old))
    cache._tidied.clear()
    ask(Maker(), key=OTHER)
    assert {path for path in folder.rglob("*") if not path.is_dir()} == {
        *mine,
        begun,
        kept(folder),
        kept(folder, OTHER),
    }


def make_older(folder: Path) -> list[Path]:
    """Write entries as the first format had them, and return files beside them that are not its."""
    mine = [folder / "kernels" / "notes.o", folder / "linked" / f"{KEY}.txt", folder / "mine" / f"{KEY}.o"]
    for path in (*mine, folder / "kernels" / f"{KEY}.o", folder / "linked" / OTHER):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        path.write_bytes(b"")
    return mine


def test_what_is_not_used_for_long_is_removed(folder):
    ask(Maker())
    ask(Maker(), key=OTHER)
    days = 86400.0
    for key, age in ((KEY, cache.KEPT_DAYS + 1), (OTHER, cache.KEPT_DAYS - 1)):
        at = time.time() - age * days
        os.utime(kept(folder, key), (at, at))
    cache._tidied.clear()
    ask(Maker(), key="2" * 64)
    assert {entry.path.name[7] for entry in cache.entries()} == {"1", "2"}
    assert ask(Maker(), key=OTHER) == 0
    assert kept(folder, OTHER).stat().st_mtime > time.time() - days


def test_of_too_much_the_longest_unused_is_removed(folder, monkeypatch):
    for i in range(3):
        ask(Maker(), key=str(i) * 64)
        at = time.time() - 1000 + [0, 200, 100][i]
        os.utime(kept(folder, str(i) * 64), (at, at))
    monkeypatch.setattr(cache, "KEPT_BYTES", 2 * WHOLE)
    cache._tidied.clear()
    ask(Maker(), key="3" * 64)
    assert {entry.path.name[7] for entry in cache.entries()} == {"1", "3"}


def make_foreign(folder: Path) -> list[Path]:
    """Put things that are not ours into a cache, some under names nearly ours."""
    inner = folder / "v2"
    (inner / f"library-{KEY}").mkdir()
    (inner / f"zig-{OTHER}.e").mkdir()
    (folder / "precious").write_text("mine")
    link = inner / f"runner-{OTHER}"
    link.symlink_to(folder / "precious")
    names = [
        folder / f"kernel-{KEY}", inner / "notes.txt", inner / f"kernel-{KEY}.bak", inner / f"kernels-{KEY}",
        inner / f"kernel-{KEY[1:]}", inner / f".kernel-{KEY}", inner / f"library-{KEY}" / "x",
        inner / f"zig-{OTHER}.e" / "o",
    ]  # fmt: skip
    for path in names:
        path.write_text("mine")
    return [*names, link, folder / "precious", *make_older(folder)]


def test_clear_removes_what_is_ours_and_nothing_else(folder):
    ask(Maker())
    ask(Maker(), key=OTHER)
    mine = make_foreign(folder)
    (folder / "v2" / f".kernel-{KEY}.{'0' * 16}").write_bytes(b"")
    tree = folder / "v2" / f"zig-{KEY}.d" / "o"
    tree.mkdir(parents=True)
    (tree / "libc.a").write_bytes(b"x")
    removed = cache.clear()
    assert sorted(entry.kind for entry in removed) == ["kernel", "kernel", "older", "older", "unfinished", "unfinished"]
    assert sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()) == sorted(mine)
    assert ask(Maker(), times=2) == 1


def test_empty_folders_of_others_stay(folder):
    for name in ("kernels", "linked"):
        (folder / name).mkdir(mode=0o700, parents=True)
    folder.chmod(0o700)
    ask(Maker())
    assert [entry.kind for entry in cache.clear()] == ["kernel"]
    assert sorted(path.name for path in folder.iterdir()) == ["kernels", "linked"]


def test_clear_of_an_empty_or_missing_cache(folder):
    assert cache.clear() == []
    ask(Maker())
    assert len(cache.clear()) == 1
    assert list(folder.iterdir()) == []


def call(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["cache", *args])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_the_command(folder, capsys):
    code, out, err = call(capsys)
    assert (code, err) == (0, "")
    assert out.splitlines()[:3] == [f"folder   {folder}", "entries  0", "size     0 B"]
    assert not folder.exists()
    ask(Maker())
    _, out, _ = call(capsys)
    assert f"entries     1 (1 kernel)\nsize        {WHOLE / 1024:.1f} KiB\n" in out
    _, out, _ = call(capsys, "--json")
    one = {"entries": 1, "bytes": WHOLE}
    assert json.loads(out) == {"folder": str(folder), "trouble": None, **one, "kinds": {"kernel": one}}
    code, out, _ = call(capsys, "clear", "--json")
    assert (code, json.loads(out)["entries"]) == (0, 1)
    assert call(capsys, "clear")[1] == f"removed 0 entries, 0 B, from {folder}\n"


def test_the_command_says_what_is_wrong(folder, capsys):
    ask(Maker())
    folder.chmod(0o777)
    code, out, _ = call(capsys)
    assert code == 0
    assert f"not used  others may write to {folder} " in out
    assert "others may write" in json.loads(call(capsys, "--json")[1])["trouble"]
    code, out, err = call(capsys, "clear")
    assert (code, out) == (3, "")
    assert f"nothing is removed\n  where: {folder}\n  why: others may write to" in err
    assert kept(folder).exists()
    assert call(capsys, "claer")[::2] == (2, "error: unknown action 'claer'\n  try: did you mean clear?\n")


@as_root
def test_the_command_names_what_can_not_be_removed(folder, small_disk, monkeypatch, capsys):
    disk = small_disk()
    monkeypatch.setenv(cache.VARIABLE, str(disk / "cache"))
    ask(Maker())
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, _, err = call(capsys, "clear")
    assert code == 3
    assert f"can't be cleared whole\n  where: {kept(disk / 'cache')}\n  why: Read-only file system" in err


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
