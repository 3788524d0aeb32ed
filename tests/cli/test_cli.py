"""The command line: help, wrong use, lists, and what it prints; `test_commands` has the work on bundles."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sample_bundle import FILES, make_manifest

from dvexport.bundle.archive import write_bundle
from dvexport.bundle.manifest import ModelEntry
from dvexport.cli.export import origin_lines
from dvexport.cli.options import parse_force, parse_pairs
from dvexport.cli.output import checklist, file_size, print_table
from dvexport.errors import UsageError
from dvexport.models import zoo
from dvexport.models.checkpoints.families import FAMILIES
from dvexport.models.option_help import option_help

COMMANDS = (
    "models", "targets", "checkpoint", "export", "inspect", "verify", "run", "profile", "slim", "unpack", "tune",
    "train", "cache",
)  # fmt: skip
HEAVY = ("torch", "onnx", "onnxruntime", "onnx_ir", "numpy", "pydantic", "rich", "av", "matplotlib")


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "a.dvx", make_manifest(), FILES).path


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from dvexport.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print(sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: dvexport {command}")


def test_wrong_use(call):
    for args, text in (
        (["exprot"], "error: unknown command 'exprot'\n  try: did you mean export"),
        (["export", "m", "--targt", "x"], "Did you mean"),
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
    assert done.stderr == "error: unknown command 'exprot'\n  try: did you mean export, checkpoint, profile?\n"


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


def test_models_explains_each_option_as_commands_take_it(call):
    code, out, _ = call("models", "vit_small")
    assert code == 0
    for option in ("sta\\.r +0 +tokens that each group drops", "sta\\.groups +8,4,2 ", "size +224x224 "):
        assert re.search(f"^{option}", out, re.MULTILINE)
    assert re.search(r"^views +one +one\|kinetics +how frames are taken", out, re.MULTILINE)
    assert re.search(r"^mean_pooling +true +true\|false ", out, re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in zoo.names() if not name.endswith("50")])
def test_every_option_of_the_zoo_is_explained_and_can_be_given_as_it_is_shown(name):
    info = zoo.describe(name)
    shown = option_help(FAMILIES[info.family].config, info.options)
    assert all(len(one.text) > 5 and not one.text.startswith("see `") for one in shown)
    assert zoo.parsed_settings(name, {one.name: one.value for one in shown}) == info.options


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


def test_where_options_come_from_is_told():
    assert origin_lines(ModelEntry(name="m", settings={"shift": "none"})) == []  # nothing was imported
    entry = ModelEntry(name="m", settings={"shift": "none"}, inferred={"depth": 18}, assumed={"size": [224, 224]})
    assert origin_lines(entry) == [
        "inferred: depth=18",
        "given: shift=none",
        "assumed: size=224x224  (nothing tells it; overrule with --set)",
    ]


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


def count_to(many, verbose):
    with checklist(verbose) as progress:
        progress("first")
        for done in range(many + 1):
            progress(f"compile: {done} of {many}" + (f", k{done}" if done else ""))
        progress("last: with a colon")


def test_a_step_that_goes_on_is_told_now_and_then(capsys):
    count_to(3, verbose=False)
    assert capsys.readouterr().err.splitlines() == ["first", "compile: 0 of 3", "compile: 3 of 3", "last: with a colon"]
    count_to(2, verbose=True)
    assert capsys.readouterr().err.splitlines()[1:4] == [
        "compile: 0 of 2",
        "compile: 1 of 2  k1",
        "compile: 2 of 2  k2",
    ]


def test_a_step_that_goes_on_is_one_line_of_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    count_to(2, verbose=False)
    lines = re.findall(r"✓ (.+) \d\.\d s", capsys.readouterr().err)
    assert lines == ["first", "compile: 2 of 2", "last: with a colon"]


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


def test_tune_writes_a_target_file(call, tmp_path, monkeypatch):
    from dvexport.targets import catalogue
    from dvexport.targets.tvm.machine.rates import Parameters
    from dvexport.targets.tvm.tuning import fit, measure, parameters

    own = Parameters((7, 3), (5, 5), 0, 64, (12, 8), "measured: here")
    asked = []
    monkeypatch.setattr(parameters, "choose_parameters", lambda *_: asked.append(True) or own)
    seconds = []
    rates = dataclasses.replace(catalogue.load("x86-64-avx512").runtimes["tvm"].rates.f32, product=0.123456)
    made = fit.Fit(rates, median=0.0812, ninth=0.3, choices=40, right=38, lost=0.004)
    monkeypatch.setattr(measure, "measure", lambda _machine, works, time, _tell: seconds.append(time) or works)
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
