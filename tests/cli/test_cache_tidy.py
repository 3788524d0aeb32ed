"""What the cache removes by itself, and `dvexport cache`, which shows and clears it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from cache_folder import KEY, OTHER, WHOLE, Maker, as_root, ask, kept

from dvexport.targets.tvm.build import cache


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


def test_the_command(folder, call):
    code, out, err = call("cache")
    assert (code, err) == (0, "")
    assert out.splitlines()[:3] == [f"folder   {folder}", "entries  0", "size     0 B"]
    assert not folder.exists()
    ask(Maker())
    _, out, _ = call("cache")
    assert f"entries     1 (1 kernel)\nsize        {WHOLE / 1024:.1f} KiB\n" in out
    _, out, _ = call("cache", "--json")
    one = {"entries": 1, "bytes": WHOLE}
    assert json.loads(out) == {"folder": str(folder), "trouble": None, **one, "kinds": {"kernel": one}}
    code, out, _ = call("cache", "clear", "--json")
    assert (code, json.loads(out)["entries"]) == (0, 1)
    assert call("cache", "clear")[1] == f"removed 0 entries, 0 B, from {folder}\n"


def test_the_command_says_what_is_wrong(folder, call):
    ask(Maker())
    folder.chmod(0o777)
    code, out, _ = call("cache")
    assert code == 0
    assert f"not used  others may write to {folder} " in out
    assert "others may write" in json.loads(call("cache", "--json")[1])["trouble"]
    code, out, err = call("cache", "clear")
    assert (code, out) == (3, "")
    assert f"nothing is removed\n  where: {folder}\n  why: others may write to" in err
    assert kept(folder).exists()
    assert call("cache", "claer")[::2] == (2, "error: unknown action 'claer'\n  try: did you mean clear?\n")


@as_root
def test_the_command_names_what_can_not_be_removed(folder, small_disk, monkeypatch, call):
    disk = small_disk()
    monkeypatch.setenv(cache.VARIABLE, str(disk / "cache"))
    ask(Maker())
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, _, err = call("cache", "clear")
    assert code == 3
    assert f"can't be cleared whole\n  where: {kept(disk / 'cache')}\n  why: Read-only file system" in err
