import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from sample_bundle import FILES, make_manifest

from dvexport.bundle.archive import write_bundle
from dvexport.bundle.manifest import ModelEntry
from dvexport.cli import main
from dvexport.cli.export import origin_lines
from dvexport.cli.options import parse_force, parse_pairs
from dvexport.cli.output import checklist, file_size, print_table
from dvexport.errors import CheckpointError, UsageError

HEAVY = ("torch", "onnx", "onnxruntime", "onnx_ir", "numpy", "pydantic", "rich", "av", "matplotlib")


@pytest.fixture
def call(capsys):
    """Return a function that runs the command line and returns exit code, output and error text."""

    def run(*args):
        with pytest.raises(SystemExit) as left:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return run


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "a.dvx", make_manifest(), FILES).path


@pytest.fixture
def provide(monkeypatch):
    """Return a function that puts `function` in place of a stage's work, and records its arguments."""

    def put(module, name, result):
        calls = []

        def work(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(result, Exception):
                raise result
            return result

        stand_in = ModuleType(module)
        setattr(stand_in, name, work)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return calls

    return put


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; from dvexport.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print(sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert done.stdout.splitlines()[-1] == "[]"
    assert min(times) < 0.5
    for command in ("models", "targets", "export", "inspect", "verify", "run", "profile", "tune", "train", "cache"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize(
    "command", ["models", "targets", "export", "inspect", "verify", "run", "profile", "tune", "train", "cache"]
)
def test_every_command_has_help(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: dvexport {command}")


def test_wrong_use(call):
    for args, text in (
        (["exprot"], "error: unknown command 'exprot'\n  try: did you mean export"),
        (["export", "m", "--targt", "x"], "Did you mean '--target'?"),
        (["export", "m"], "error: Missing option"),
        (
            ["export", "m", "-o", "x", "--backend", "onxx"],
            "error: unknown backend 'onxx'\n  try: did you mean onnx?",
        ),
        (
            ["export", "m", "-o", "x", "--mode", "streem"],
            "error: unknown mode 'streem'\n  try: did you mean stream?",
        ),
        (["export", "m", "-o", "x", "--set", "classes"], "error: --set takes KEY=VALUE"),
        (["export", "m", "-o", "x", "--lowering", "=tiles"], "error: --lowering takes KEY=VALUE"),
        (["export", "m", "-o", "/no/such/x.dvx"], "error: cannot write x.dvx\n  where: /no/such"),
        (
            ["targets", "raspberypi4"],
            "error: unknown target 'raspberypi4'\n  try: did you mean raspberry-pi-4",
        ),
        (
            ["models", "dstep_resnet81"],
            "error: unknown model 'dstep_resnet81'\n  try: did you mean dstep_resnet18",
        ),
        (["profile", "x", "--force", "tiles=2"], "error: --force takes rates from 0 to 1, not '2'"),
        (
            ["profile", "x", "--force", "tile=1"],
            "error: unknown kind of decision 'tile'\n  try: did you mean tiles, tokens?",
        ),
        (["profile", "x", "--warmup", "inf"], "Invalid value for '--warmup'"),
        (["profile", "x", "--threads", "two"], "Invalid value for '--threads'"),
        (["run", "no.dvx", "--clip", "v.mp4"], "error: can't read the bundle\n  where: no.dvx"),
    ):
        code, out, err = call(*args)
        assert (code, out) == (2, ""), args
        assert text in err, args
        assert "Traceback" not in err


@pytest.mark.parametrize("module", ["dvexport", "dvexport.cli"])
def test_runs_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "exprot"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'exprot'\n  try: did you mean export, profile?\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_can_not_be_written_gives_one_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dvexport", "models"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (3, "error: No space left on device\n")


def test_no_command_shows_the_help(call):
    code, _, err = call()
    assert code == 2
    assert "Commands:" in err


def test_version(call):
    code, out, _ = call("--version")
    assert code == 0
    assert out.startswith("dvexport, version ")


def test_a_device_that_this_release_has_not(call, bundle):
    code, _, err = call("profile", bundle, "--device", "adb:123")
    assert code == 3
    assert "'adb:123' is not available in this release" in err
    assert "--device local" in err


def test_targets(call):
    code, out, _ = call("targets")
    assert code == 0
    assert any(line.startswith("raspberry-pi-5 ") for line in out.splitlines())
    code, out, _ = call("targets", "raspberry-pi-5")
    assert "38.4 GFLOP/s a core (estimate: 2.4 GHz" in out
    assert re.search("kernel rates +estimated from lanes and peak", out)
    assert re.search("kernel parameters +those of its instruction set", out)
    code, out, _ = call("targets", "x86-64-avx512")
    assert re.search("kernel rates +measured: dvexport tune", out)
    code, out, _ = call("targets", "--json")
    assert {"rk3588", "rv1126"} <= {target["name"] for target in json.loads(out)}
    code, out, _ = call("targets", "rv1126", "--json")
    assert json.loads(out)["cpu"]["mcpu"] == "cortex-a7"


def test_models(call):
    code, out, _ = call("models")
    assert code == 0
    assert any(line.startswith("dstep_resnet18 ") for line in out.splitlines())
    code, out, _ = call("models", "--json")
    assert "dstep_resnet18" in {model["name"] for model in json.loads(out)}
    code, out, _ = call("models", "dstep_resnet18", "--json")
    assert "classes" in json.loads(out)["options"]


def test_inspect(call, bundle):
    code, out, _ = call("inspect", bundle)
    assert code == 0
    for text in (
        "dstep_resnet18 classes=3 hidden=512",
        "frames float32 1x3x64x64",
        "short side 64, crop 64x64, RGB, 8 frames uniform, 12.5 frames/s",
        "h      float32  1x8    zeros",
        "layer1.0  channels+tiles        64    7x7  tiles     unknown     cheaper",
        "model.onnx          1.0 KiB",
    ):
        assert text in out
    code, out, _ = call("inspect", bundle, "--json")
    assert json.loads(out)["gates"][0]["lowering"] == "tiles"


def test_inspect_refuses_an_altered_bundle(call, bundle):
    raw = bytearray(bundle.read_bytes())
    raw[raw.index(FILES["model.onnx"][:64]) + 10] ^= 1
    bundle.write_bytes(raw)
    code, out, err = call("inspect", bundle)
    assert (code, out) == (2, "")
    assert err.startswith("error: the bundle is damaged")


def test_export_hands_on_its_options(call, provide, bundle, tmp_path):
    from dvexport.bundle.archive import Bundle

    calls = provide("dvexport.export", "export", Bundle.open(bundle))
    code, out, _ = call(
        *("export", "dstep_resnet18", "--checkpoint", "w.pt", "--set", "frames=16", "--set", "shift=none"),
        *("--target", "rk3588", "--mode", "clip", "--lowering", "layer1.0=tiles", "-o", tmp_path / "o.dvx"),
        *("--calibrate", "v.mp4", "--assume-defaults"),
    )
    assert code == 0
    ((args, kwargs),) = calls
    assert args == ("dstep_resnet18",)
    assert callable(kwargs.pop("progress"))
    assert {
        key: str(value) if key in ("checkpoint", "calibrate", "output") else value for key, value in kwargs.items()
    } == {
        "checkpoint": "w.pt",
        "settings": {"frames": "16", "shift": "none"},
        "assume_defaults": True,
        "target": "rk3588",
        "backend": "onnx",
        "mode": "clip",
        "lowering": {"layer1.0": "tiles"},
        "calibrate": "v.mp4",
        "output": str(tmp_path / "o.dvx"),
    }
    assert "gates: 1 tiles" in out
    assert f"next: dvexport verify {tmp_path / 'o.dvx'}" in out


def test_where_options_come_from_is_told():
    assert origin_lines(ModelEntry(name="m", settings={"shift": "none"})) == []  # nothing was imported
    entry = ModelEntry(name="m", settings={"shift": "none"}, inferred={"depth": 18}, assumed={"size": [224, 224]})
    assert origin_lines(entry) == [
        "inferred: depth=18",
        "given: shift=none",
        "assumed: size=224x224  (nothing tells it; overrule with --set)",
    ]


def test_export_leaves_nothing_behind_when_it_fails(call, provide, tmp_path):
    provide("dvexport.export", "export", CheckpointError("truncated", where="w.pt"))
    code, out, err = call("export", "m", "-o", tmp_path / "o.dvx")
    assert (code, out) == (2, "")
    assert err == "error: truncated\n  where: w.pt\n"
    assert list(tmp_path.iterdir()) == []


def test_verify(call, provide, bundle):
    rows = [("largest difference", 3.0e-7, 1e-5, True), ("decisions", "128 of 128", None, True)]
    report = SimpleNamespace(rows=rows, ok=True, notes=(), gates=(), to_dict=lambda: {"ok": True})
    calls = provide("dvexport.verify", "verify", report)
    code, out, err = call("verify", bundle, "--clip", "v.mp4")
    assert code == 0
    assert out.splitlines()[1].split() == ["largest", "difference", "3e-07", "1e-05", "ok"]
    assert "check the bundle's files\n" in err
    assert str(calls[0][1]["clip"]) == "v.mp4"
    assert calls[0][1]["checkpoint"] is None
    code, out, _ = call("verify", bundle, "--json")
    assert json.loads(out) == {"ok": True}


def test_a_failed_verify_exits_with_1(call, provide, bundle):
    rows = [("largest difference", 0.5, 1e-5, False), ("decisions", 3, 3, True)]
    provide("dvexport.verify", "verify", SimpleNamespace(rows=rows, ok=False, notes=("no stream",), gates=()))
    code, out, err = call("verify", bundle)
    assert code == 1
    assert "FAILED" in out and "note: no stream\n" in out
    assert "error: 1 of 2 checks failed\n  where: largest difference" in err


def test_run(call, provide, bundle):
    result = SimpleNamespace(top=[("left", 0.875), ("up", 0.125)], to_dict=lambda: {"top": [["left", 0.875]]})
    calls = provide("dvexport.run.run", "run", result)
    code, out, _ = call("run", bundle, "--clip", "v.mp4", "--threads", "2")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["probability", "class"],
        ["87.50%", "left"],
        ["12.50%", "up"],
    ]
    assert [str(arg) for arg in calls[0][0][1:]] == ["v.mp4", "2"]
    code, out, _ = call("run", bundle, "--clip", "v.mp4", "--json")
    assert json.loads(out)["top"] == [["left", 0.875]]


def test_train_hands_on_its_options(call, provide, tmp_path):
    calls = provide("dvexport.models.training.train", "train", None)
    code, _, _ = call("train", "tsn_motion", "-o", tmp_path, "--restart", "--epochs", "3")
    assert code == 0
    ((args, kwargs),) = calls
    assert args == ("tsn_motion",)
    assert callable(kwargs.pop("progress"))
    assert kwargs == {"output": tmp_path, "resume": False, "device": None, "epochs": 3}


def test_figures_that_are_off_exit_with_1(call, provide, monkeypatch):
    import dvexport.models

    found = [SimpleNamespace(name="parameters", ok=True), SimpleNamespace(name="GMACs", ok=False)]
    provide("dvexport.models.figures", "figures", found)
    stand_in = sys.modules["dvexport.models.figures"]
    rows = [("figure", "computed", "published", "difference", "", "why")]
    rows += [(f.name, "1", "1", "0 %", "ok" if f.ok else "OFF", "") for f in found]
    stand_in.table = lambda _found: rows
    monkeypatch.setattr(dvexport.models, "figures", stand_in, raising=False)
    code, out, err = call("models", "--figures", "--json")
    assert code == 1
    assert [row["ok"] for row in json.loads(out)] == [True, False]
    assert "error: 1 of 2 figures are off\n  where: GMACs" in err


def test_pairs_and_rates():
    assert parse_pairs("--set", ["a=1", "b = x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    with pytest.raises(UsageError, match="'a' twice"):
        parse_pairs("--set", ["a=1", "a=2"])
    assert parse_force("channels=0.5,tiles=.25") == {"channels": 0.5, "tiles": 0.25}
    assert parse_force("tokens=1") == {"tokens": 1.0}
    for text in ("", ",", "tiles", "tiles=x", "tiles=nan", "tiles=-0.1", "tiles=1,tiles=1"):
        with pytest.raises(UsageError):
            parse_force(text)


def test_progress_is_plain_lines_when_piped(capsys):
    with checklist() as progress:
        progress("first")
        progress("second")
    assert capsys.readouterr() == ("", "first\nsecond\n")


def test_progress_is_a_checklist_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")

    def fail():
        with checklist() as progress:
            progress("first [1]")
            progress("second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    err = capsys.readouterr().err
    assert re.search(r"✓ first \[1\] \d\.\d s", err)
    assert "✗ second 0.0 s" in err


def test_tables_keep_what_looks_like_markup(capsys):
    print_table(("a", "b"), [("[red]x[/]", "1"), ("y", "22")], right=("b",))
    assert capsys.readouterr().out == "a           b\n[red]x[/]   1\ny          22\n"


def test_file_sizes():
    assert [file_size(n) for n in (0, 1023, 1024, 1536, 5 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "5.0 MiB",
        "3072.0 GiB",
    ]


def test_profile_writes_what_was_asked_for(call, monkeypatch, bundle, tmp_path):
    import dvexport.profile
    from dvexport.profile import report, report_text, result, trace_events
    from dvexport.video.clips import write_clip

    write_clip(tmp_path / "v.mp4", np.zeros((5, 64, 64, 3), np.uint8), 12.5)
    calls, pages = [], []
    measured = SimpleNamespace(whole_clip=False, steps=[0] * 3, tokens=[])
    monkeypatch.setattr(
        dvexport.profile, "profile", lambda *args, **kwargs: calls.append(kwargs) or measured, raising=False
    )
    monkeypatch.setattr(report_text, "print_result", lambda _result: print("the table"))
    monkeypatch.setattr(result, "write_json", lambda _result, path: path.write_text("{}"))
    monkeypatch.setattr(report, "write_html", lambda _result, _path, frames: pages.append(frames.shape))
    monkeypatch.setattr(trace_events, "write_trace", lambda _result, path: path.write_text("[]"))
    code, out, _ = call(
        *("profile", bundle, "--clip", tmp_path / "v.mp4", "--force", "tiles=0.5", "--runs", "2"),
        *("--json", tmp_path / "p.json", "--html", tmp_path / "p.html", "--trace", tmp_path / "p.trace"),
    )
    assert code == 0
    assert calls[0]["force"] == {"tiles": 0.5}
    assert (calls[0]["runs"], calls[0]["warmup_s"], calls[0]["threads"], calls[0]["device"]) == (
        2,
        1.0,
        1,
        "local",
    )
    assert pages == [(3, 64, 64, 3)]
    assert (tmp_path / "p.json").read_text() == "{}"
    assert out.splitlines()[0] == "the table"
    assert f"wrote {tmp_path / 'p.trace'}" in out


def test_tune_writes_a_target_file(call, tmp_path, monkeypatch):
    from dvexport.targets import catalogue
    from dvexport.targets.tvm.machine.rates import Parameters
    from dvexport.targets.tvm.tuning import fit, parameters, tune

    own = Parameters((7, 3), (5, 5), 0, 64, (12, 8), "measured: here")
    asked = []
    monkeypatch.setattr(parameters, "choose_parameters", lambda *_: asked.append(True) or own)
    seconds = []
    rates = dataclasses.replace(catalogue.load("x86-64-avx512").runtimes["tvm"].rates.f32, product=0.123456)
    made = fit.Fit(rates, median=0.0812, ninth=0.3, choices=40, right=38, lost=0.004)
    monkeypatch.setattr(tune, "measure", lambda _machine, works, time, _tell: seconds.append(time) or works)
    monkeypatch.setattr(fit, "fit", lambda works, machine, source: dataclasses.replace(made, rates=rates))
    path = tmp_path / "mine.toml"
    code, out, _ = call("tune", "-o", path, "--seconds", "3")
    assert (code, seconds) == (0, [3.0])
    assert "[runtimes.tvm.rates.f32]" in out
    assert "product = 0.1235" in out
    assert "predicted to 8% (half of the calls), 30% (nine of ten)" in out
    assert "the faster of two kernels in 38 of 40 cases; the others cost 0.40% of time" in out
    assert catalogue.load(path).runtimes["tvm"].rates.f32.product == 0.1235
    assert catalogue.load(path).runtimes["tvm"].parameters == own
    assert catalogue.load(path).cpu == catalogue.load(catalogue.host_name()).cpu
    code, out, _ = call("tune", "--target", path, "--keep-parameters", "--json")
    result = json.loads(out)
    assert asked == [True]
    blocks = {"planes": [7, 3], "packed": [5, 5], "tall": 0, "small_plane": 64, "winograd": [12, 8]}
    assert result["parameters"] == {"source": "measured: here", **blocks}
    assert result["rates"]["product"] == 0.123456
    assert result["choices"] == {"cases": 40, "right": 38, "lost": 0.004}


def test_tune_measures_only_the_machine_it_runs_on(call, tmp_path):
    from dvexport.targets import catalogue

    away = "x86-64-avx2" if catalogue.load("host").cpu.lanes == 4 else "raspberry-pi-4"
    code, out, err = call("tune", "--target", away)
    assert (code, out) == (3, "")
    assert f"the target is not this machine, so its rates can't be measured here\n  where: {away}" in err
    assert "run dvexport tune there" in err
    text = catalogue.path_of("host").read_text()
    (tmp_path / "none.toml").write_text(text.partition("[runtimes.tvm]")[0])
    code, _, err = call("tune", "--target", tmp_path / "none.toml")
    assert code == 2
    assert "compiled kernels are not among the target's runtimes" in err
