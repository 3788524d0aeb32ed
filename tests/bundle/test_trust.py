"""Native code of a bundle is a program: it is loaded if this user made it here, or says that it is trusted."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import small_bundle
from sample_bundle import FILES, make_manifest

import dvexport
from dvexport.bundle import trust
from dvexport.bundle.archive import Bundle, write_bundle
from dvexport.cli import main
from dvexport.errors import BundleError, DeviceError
from dvexport.profile.run import profile
from dvexport.run.open import open_session, variant_of
from dvexport.verify import verify

CLIP = next(iter(sorted((Path(__file__).parents[2] / "models" / "clips").glob("*.mp4"))))
NATIVE = {
    "native/libdvx.so": b"library", "native/gated.plan": b"gated", "native/dense.plan": b"dense",
    "native/forced.plan": b"forced", "native/weights.bin": bytes(64),
}  # fmt: skip
SPY = """
#include <fcntl.h>
#include <unistd.h>
__attribute__((constructor)) static void loaded(void) { close(open("%s", O_CREAT | O_WRONLY, 0600)); }
"""


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """A list of exports of the test's own."""
    monkeypatch.setenv("DVEXPORT_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def manifest(tmp_path):
    return write_bundle(tmp_path / "a.dvx", make_manifest(backend="tvm"), {**FILES, **NATIVE}).manifest


@pytest.fixture(scope="module")
def spy(tmp_path_factory):
    """A bundle whose library leaves a file behind as soon as it is loaded, and that file."""
    pytest.importorskip("ziglang")
    folder = tmp_path_factory.mktemp("spy")
    (folder / "spy.c").write_text(SPY % (folder / "loaded"))
    command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", str(folder / "spy.c")]
    subprocess.run([*command, "-o", str(folder / "spy.so")], check=True)
    good = small_bundle("dstep_resnet18", "stream")
    native = {**NATIVE, "native/libdvx.so": (folder / "spy.so").read_bytes()}
    files = {name: good.read(name) for name in good.manifest.files if name != "model.onnx"}
    manifest = good.manifest.model_copy(update={"backend": "tvm"})
    return write_bundle(folder / "spy.dvx", manifest, {**files, **native}), folder / "loaded"


USES = {
    "open_session": lambda bundle: open_session(bundle, variant="dense"),
    "variant_of": lambda bundle: variant_of(bundle, "forced").open(),
    "verify": verify,
    "profile": lambda bundle: profile(bundle, runs=1, warmup_s=0.0),
    "run": lambda bundle: dvexport.run(bundle, CLIP),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_code_of_others_is_refused_before_it_is_loaded(spy, use):
    bundle, loaded = spy
    with pytest.raises(BundleError, match="native code, which was not made on this machine by you") as error:
        use(Bundle.open(bundle.path))
    assert error.value.exit_code == 2
    assert not loaded.exists()
    with pytest.raises(DeviceError, match="library can't be loaded"):  # it is no network's
        use(Bundle.open(bundle.path, trust=True))
    loaded.unlink()


@pytest.mark.parametrize("command", [["run", "--clip", str(CLIP)], ["verify"], ["profile"]], ids=lambda c: c[0])
def test_the_commands_say_how_to_trust_it(spy, command, capsys):
    bundle, loaded = spy
    arguments = [command[0], str(bundle.path), *command[1:]]
    with pytest.raises(SystemExit) as left:
        main(arguments)
    text = capsys.readouterr().err
    assert left.value.code == 2
    assert "native code is a program" in text
    assert "--trust" in text
    assert not loaded.exists()
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--trust"])
    assert left.value.code == 3
    loaded.unlink()


def test_opening_and_inspecting_run_nothing_and_say_what_would(spy, capsys):
    bundle, loaded = spy
    for line in ("not made here by you: runs only with --trust", "made here by you: runs"):
        with pytest.raises(SystemExit) as left:
            main(["inspect", str(bundle.path)])
        assert left.value.code == 0
        assert f"  {line}\n" in capsys.readouterr().out
        trust.remember(bundle.manifest)
    assert not loaded.exists()
    with pytest.raises(SystemExit):
        main(["inspect", str(small_bundle("dstep_resnet18", "stream").path), "--json"])
    assert '"code": "none"' in capsys.readouterr().out


def test_a_refused_bundle_has_loaded_nothing_though_it_is_trusted(spy, tmp_path):
    """Golden data and graphs that can't be read are found before the code runs."""
    bundle, loaded = spy
    for name in ("golden.safetensors", "gate_level.onnx"):
        files = {each: b"\xff no such file" if each == name else bundle.read(each) for each in bundle.manifest.files}
        broken = write_bundle(tmp_path / name, bundle.manifest, files)
        with pytest.raises(BundleError, match="can't be read"):
            verify(replace(broken, trust=True))
        assert not loaded.exists()


def test_what_was_made_here_is_remembered(manifest, state):
    assert not trust.made_here(manifest)
    assert trust.remember(manifest)
    assert trust.remember(manifest)
    assert trust.made_here(manifest)
    assert [path.name for path in (state / "exports").iterdir()] == [trust.code_digest(manifest)]
    assert (state / "exports").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", NATIVE)
def test_a_change_of_any_native_file_makes_it_anothers(manifest, name, tmp_path):
    trust.remember(manifest)
    changed = write_bundle(tmp_path / "b.dvx", manifest, {**FILES, **NATIVE, name: b"changed"})
    assert not trust.made_here(changed.manifest)
    less = write_bundle(tmp_path / "c.dvx", manifest, {**FILES, **{k: v for k, v in NATIVE.items() if k != name}})
    assert not trust.made_here(less.manifest)
    more = write_bundle(tmp_path / "d.dvx", manifest, {**FILES, **NATIVE, "native/more": b""})
    assert not trust.made_here(more.manifest)


def test_the_rest_of_a_bundle_is_no_code(manifest, tmp_path):
    trust.remember(manifest)
    files = {**FILES, **NATIVE, "extra/plan.json": b"[]"}
    assert trust.made_here(write_bundle(tmp_path / "b.dvx", manifest, files).manifest)


def test_a_bundle_without_code_is_nothing_to_remember(tmp_path):
    plain = write_bundle(tmp_path / "a.dvx", make_manifest(), FILES).manifest
    trust.remember(plain)
    assert not trust.made_here(plain)


def _link(path, target):
    target.mkdir(mode=0o700)
    os.rename(path, target / "real")
    path.symlink_to(target / "real")


DISBELIEVED = {
    "others may write the list": lambda folder, entry, tmp: folder.chmod(0o777),
    "a group may write the list": lambda folder, entry, tmp: folder.chmod(0o770),
    "the list is a link": lambda folder, entry, tmp: _link(folder, tmp / "target"),
    "the entry is a link": lambda folder, entry, tmp: _link(entry, tmp / "target"),
    "others may write the entry": lambda folder, entry, tmp: entry.chmod(0o666),
    "the entry is a folder": lambda folder, entry, tmp: (entry.unlink(), entry.mkdir()),
    "the entry is another": lambda folder, entry, tmp: entry.rename(folder / ("0" * 64)),
    "the list is a file": lambda folder, entry, tmp: (entry.unlink(), folder.rmdir(), folder.touch()),
}


@pytest.mark.parametrize("change", DISBELIEVED.values(), ids=DISBELIEVED)
def test_a_list_that_others_may_have_written_is_not_believed(manifest, state, tmp_path, change):
    trust.remember(manifest)
    folder = state / "exports"
    change(folder, folder / trust.code_digest(manifest), tmp_path)
    assert not trust.made_here(manifest)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("part", ["folder", "entry"])
def test_a_list_of_another_user_is_not_believed(manifest, state, part):
    trust.remember(manifest)
    folder = state / "exports"
    os.chown(folder if part == "folder" else folder / trust.code_digest(manifest), 12345, 12345)
    assert not trust.made_here(manifest)
    if part == "folder":
        assert not trust.remember(manifest)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_list_that_another_users_link_leads_to_is_not_believed(manifest, state, tmp_path, monkeypatch):
    trust.remember(manifest)
    (tmp_path / "link").symlink_to(state)
    monkeypatch.setenv("DVEXPORT_STATE", str(tmp_path / "link"))
    assert trust.made_here(manifest)
    os.lchown(tmp_path / "link", 12345, 12345)
    assert not trust.made_here(manifest)


def test_a_list_that_others_may_write_is_not_written_to(manifest, state):
    (state / "exports").mkdir(parents=True)
    (state / "exports").chmod(0o777)
    assert not trust.remember(manifest)
    assert list((state / "exports").iterdir()) == []


def test_the_list_is_never_in_the_working_folder(manifest, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVEXPORT_STATE", "state")
    assert trust.exports_folder() is None
    assert not trust.remember(manifest)
    monkeypatch.delenv("DVEXPORT_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert trust.exports_folder() == tmp_path / "home" / ".local" / "state" / "dvexport" / "exports"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert trust.exports_folder() == tmp_path / "xdg" / "dvexport" / "exports"
    assert trust.remember(manifest)
    assert trust.made_here(manifest)


def test_no_home_is_no_list(manifest, monkeypatch):
    monkeypatch.delenv("DVEXPORT_STATE")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda _: (_ for _ in ()).throw(RuntimeError("no home"))))
    assert trust.exports_folder() is None
    assert not trust.remember(manifest)
    assert not trust.made_here(manifest)


def test_an_export_that_can_not_be_remembered_says_so(manifest, monkeypatch, state):
    from dvexport.cli.export import trust_line

    state.write_text("a file where the folder should be")
    assert not trust.remember(manifest)
    (line,) = trust_line(manifest)
    assert "running it needs --trust here too" in line
    state.unlink()
    trust.remember(manifest)
    assert trust_line(manifest) == []
