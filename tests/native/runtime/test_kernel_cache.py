"""Compiled kernels and linked libraries through the cache: damage is healed, processes share it, full disks told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_harness import host_machine
from runtime_plans import relu

from dvexport.errors import DeviceError
from dvexport.targets.tvm.build import cache, compile, libraries, link
from dvexport.targets.tvm.build.cache_files import read_entry, tree_files, tree_of

KEY = "0" * 64

TWO = """
import sys
sys.path[:0] = {path!r}
from native_harness import host_machine
from runtime_plans import relu
from dvexport.targets.tvm.build import compile
sys.stdin.readline()
sys.stdout.buffer.write(compile.compile_kernel(relu(), host_machine()))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    for name, nothing in (("_said", set()), ("_tidied", set()), ("_seen", {})):
        monkeypatch.setattr(cache, name, nothing)
    return tmp_path / "cache" / "v2"


def damaged(data: bytes) -> list[bytes]:
    """An entry's file as accidents leave it: each of these went into every later export, or ran."""
    half = len(data) // 2
    flipped = bytearray(data)
    flipped[half] ^= 1
    return [b"", data[:half], b"garbage", bytes(flipped)]


def test_a_damaged_object_is_compiled_again(folder):
    told: list[str] = []
    good = compile.compile_kernel(relu(), host_machine(), told.append)
    (path,) = folder.glob("kernel-*")
    written = path.read_bytes()
    for data in damaged(written):
        path.write_bytes(data)
        assert compile.compile_kernel(relu(), host_machine(), told.append) == good
        assert path.read_bytes() == written
    assert told == ["compile kernels: 0 of 1", "compile kernels: 1 of 1, relu"] * 5
    assert compile.compile_kernel(relu(), host_machine(), told.append) == good
    assert len(told) == 10


def test_equal_kernels_of_two_names_are_two_entries(folder):
    first, second = relu(), relu()
    object.__setattr__(second, "name", "other")
    compile.compile_kernel(first, host_machine())
    compile.compile_kernel(second, host_machine())
    assert len(cache.entries()) == 2


def test_two_processes_share_a_cold_cache(folder):
    path = [entry for entry in sys.path if entry]
    command = [sys.executable, "-c", TWO.format(path=path)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) for _ in range(2)]
    for process in started:  # both are on their mark when they can be written to
        process.stdin.write(b"go\n")
    made = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert made[0] == made[1] == compile.compile_kernel(relu(), host_machine())
    assert [entry.kind for entry in cache.entries()] == ["kernel"]
    assert len(list(folder.iterdir())) == 1


def make_link(folder: Path, log: list[str], content: bytes = b"libc"):
    """A link whose compiler builds a library unless it is there, as that of `ziglang` does."""

    def run() -> None:
        shared = Path(libraries.compiler_environment(folder)["ZIG_GLOBAL_CACHE_DIR"])
        library = shared / "o" / "libc.a"
        if library.exists():
            log.append("linked " + library.read_text())
            return
        for name in ("b", "h", "o"):
            (shared / name).mkdir(parents=True)
        library.write_bytes(content)
        (shared / "h" / "list").write_bytes(b"inputs")
        log.append("built")

    return run


def run_link(tmp_path: Path, log: list[str]) -> str:
    """Link in a folder of its own and return what was done."""
    place = tmp_path / f"link{len(log)}"
    place.mkdir()
    libraries.with_libraries(KEY, place, make_link(place, log))
    return log[-1]


def break_byte(tree: Path) -> None:
    (tree / "o" / "libc.a").write_bytes(b"libd")


def empty(tree: Path) -> None:
    (tree / "o" / "libc.a").write_bytes(b"")


def remove(tree: Path) -> None:
    (tree / "h" / "list").unlink()


def add_file(tree: Path) -> None:
    (tree / "h" / "more").write_bytes(b"")


def link_away(tree: Path) -> None:
    (tree / "o" / "libc.a").rename(tree / "libc.a")
    (tree / "o" / "libc.a").symlink_to(tree / "libc.a")


def pipe(tree: Path) -> None:
    (tree / "h" / "list").unlink()
    os.mkfifo(tree / "h" / "list")


def remove_all(tree: Path) -> None:
    shutil.rmtree(tree)


def link_all(tree: Path) -> None:
    tree.rename(tree.parent / "elsewhere")
    tree.symlink_to(tree.parent / "elsewhere")


def unlist(tree: Path) -> None:
    tree.with_suffix("").write_bytes(b"")


@pytest.mark.parametrize("damage", [break_byte, empty, remove, add_file, link_away, pipe, remove_all, unlist])
def test_damaged_libraries_of_the_compiler_are_built_again(folder, tmp_path, damage):
    log: list[str] = []
    assert run_link(tmp_path, log) == "built"
    assert run_link(tmp_path, log) == "linked libc"
    damage(folder / f"zig-{KEY}.d")
    assert run_link(tmp_path, log) == "built"
    assert run_link(tmp_path, log) == "linked libc"
    assert sorted(path.name for path in folder.iterdir()) == [f"zig-{KEY}", f"zig-{KEY}.d"]
    assert [entry.kind for entry in cache.clear()] == ["zig"]
    assert not folder.exists()


def test_without_a_cache_libraries_are_built_for_every_link(folder, tmp_path):
    folder.parent.write_text("mine")
    log: list[str] = []
    assert [run_link(tmp_path, log), run_link(tmp_path, log)] == ["built", "built"]
    assert folder.parent.read_text() == "mine"


def test_two_links_on_a_cold_cache_both_succeed(folder, tmp_path, caplog):
    log: list[str] = []
    place = tmp_path / "place"
    place.mkdir()
    link_first = make_link(place, log, b"first")

    def link_slowly() -> None:
        link_first()
        run_link(tmp_path, log)  # another process begins later and ends earlier

    libraries.with_libraries(KEY, place, link_slowly)
    assert log == ["built", "built"]
    assert run_link(tmp_path, log) == "linked libc"
    assert caplog.records == []
    assert len(list(folder.iterdir())) == 2


def test_a_link_whose_libraries_are_removed_meanwhile_is_made_again(folder, tmp_path):
    log: list[str] = []
    run_link(tmp_path, log)
    place = tmp_path / "place"
    place.mkdir()
    link_again = make_link(place, log)

    def fails_once() -> None:
        if not log[-1].startswith("gone"):
            cache.clear()
            log.append("gone")
            raise DeviceError("can't open libc.a")
        link_again()

    libraries.with_libraries(KEY, place, fails_once)
    assert log == ["built", "gone", "built"]


def test_an_error_of_a_link_is_passed_on_once(folder, tmp_path):
    log: list[str] = []
    run_link(tmp_path, log)
    place = tmp_path / "place"
    place.mkdir()
    calls = []

    def fails() -> None:
        calls.append(1)
        raise DeviceError("undefined symbol")

    with pytest.raises(DeviceError, match="undefined symbol"):
        libraries.with_libraries(KEY, place, fails)
    assert calls == [1]


def test_a_link_without_a_cache_or_a_home(tmp_path, monkeypatch):
    """Real ones: kept libraries are those that were built, and a damaged library is linked again."""
    net_objects, table = {"relu": compile.compile_kernel(relu(), host_machine())}, link.kernel_table([relu()])
    want = link.link_library(net_objects, table, host_machine())
    kept = cache.usable_folder()
    assert kept is not None
    place = tmp_path / "cache"
    shutil.copytree(
        kept, place / "v2", ignore=lambda _, names: [n for n in names if n.startswith(("runner", "kernel", "library"))]
    )
    place.chmod(0o700)
    monkeypatch.setenv(cache.VARIABLE, str(place))
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert link.link_library(net_objects, table, host_machine()) == want
    (path,) = [path for path in (place / "v2").glob("library-*") if read_entry(path) == want]
    written = path.read_bytes()
    for data in damaged(written)[1::2]:
        path.write_bytes(data)
        assert link.link_library(net_objects, table, host_machine()) == want
        assert path.read_bytes() == written
    for entry in (place / "v2").glob("zig-*[0-9a-f]"):
        for file in tree_files(tree_of(entry)):
            if file.suffix == ".a":
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    path.unlink()
    assert link.link_library(net_objects, table, host_machine()) == want


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("disks can't be mounted here")
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    monkeypatch.setenv(cache.VARIABLE, str(disk / "cache"))
    try:
        compiled = compile.compile_kernel(relu(), host_machine())
        assert compiled.startswith(b"\x7fELF")
        with pytest.raises(DeviceError) as raised:
            link.link_library({"relu": compiled}, link.kernel_table([relu()]), host_machine())
    finally:
        subprocess.run(["umount", disk], check=True)
    assert raised.value.what == "the compiler's temporary folder can't be written"
    assert str(disk) in str(raised.value.where)
    assert (raised.value.why, raised.value.hint) == (
        "No space left on device", "free some space, or name another folder with TMPDIR",
    )  # fmt: skip


def test_a_compiler_that_fails_is_told_as_what_it_is(tmp_path, monkeypatch):
    killed = f"{sys.executable} -c 'import os; os.kill(os.getpid(), 9)'"
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nexec {killed}\n")
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(DeviceError, match="can't be started: Permission denied"):
        link._zig(tmp_path, ["cc", "-target", "x86_64-linux-gnu"])
    script.chmod(0o755)
    with pytest.raises(DeviceError, match="ended by SIGKILL"):
        link._zig(tmp_path, ["cc", "-target", "x86_64-linux-gnu"])
