import dataclasses
import tomllib
from pathlib import Path

import pytest

from dvexport.errors import UsageError
from dvexport.targets import catalogue
from dvexport.targets.tvm.machine.rates import Parameters
from dvexport.targets.tvm.tuning import target_file

CATALOG = Path(catalogue.__file__).parent / "catalog"
REAL = (CATALOG / "raspberry-pi-5.toml").read_text()


@pytest.fixture
def changed(tmp_path):
    """Return a function that writes a real target file with one text replaced."""

    def write(old, new):
        assert old in REAL
        path = tmp_path / "board.toml"
        path.write_text(REAL.replace(old, new, 1))
        return path

    return write


@pytest.mark.parametrize("name", catalogue.names())
def test_every_device_of_the_catalogue(name):
    target = catalogue.load(name)
    assert target.name == name
    for quantity in (target.peak_gflops_per_core, target.bandwidth_gb_per_s):
        assert quantity.estimated != quantity.source.startswith("measured")
    assert target.backends
    assert target.cpu.l1_kib <= (target.cpu.l2_kib or target.cpu.l1_kib)
    assert (target.cpu.lanes == 4) == (target.cpu.triple.startswith(("aarch64", "armv7")))


def test_the_devices_people_ask_for_are_there():
    assert set(catalogue.names()) >= {
        "android-arm64",
        "raspberry-pi-4",
        "raspberry-pi-5",
        "rk3588",
        "rv1126",
        "snapdragon-xr2",
        "x86-64-avx2",
        "x86-64-avx512",
    }


def test_the_compiler_knows_every_processor():
    """The names LLVM has; a wrong one would only show when something is compiled."""
    known = {"cortex-a7", "cortex-a53", "cortex-a72", "cortex-a76", "cortex-a77", "x86-64-v3", "x86-64-v4"}
    assert {catalogue.load(name).cpu.mcpu for name in catalogue.names()} <= known


@pytest.mark.parametrize(
    ("machine", "flags", "name"),
    [
        ("x86_64", {"avx2", "avx512f"}, "x86-64-avx512"),
        ("AMD64", {"avx2"}, "x86-64-avx2"),
        ("aarch64", set(), "arm64"),
        ("arm64", set(), "arm64"),
    ],
)
def test_host_is_the_entry_that_fits_the_machine(monkeypatch, machine, flags, name):
    monkeypatch.setattr(catalogue.platform, "machine", lambda: machine)
    monkeypatch.setattr(catalogue, "_cpu_flags", lambda: flags)
    assert catalogue.load("host").name == name


@pytest.mark.parametrize(("machine", "most"), [(1, 1), (2, 2), (12, 12), (32, 32), (33, 32)])
def test_a_plan_for_this_machine_is_laid_out_for_its_cores(monkeypatch, machine, most):
    monkeypatch.setattr(catalogue.os, "cpu_count", lambda: machine)
    cpu = catalogue.load("host").cpu
    assert (cpu.cores, cpu.all_cores, cpu.most_threads) == (machine, machine, most)


def test_a_plan_is_laid_out_for_every_core_of_a_device():
    """Small ones count; an entry for processors that differ in their cores has the default."""
    found = {name: catalogue.load(name).cpu.most_threads for name in catalogue.names()}
    four = {"raspberry-pi-4", "raspberry-pi-5", "rv1126"}
    assert found == {name: 4 if name in four else 8 for name in catalogue.names()}


@pytest.mark.parametrize(("cores", "most"), [("cores = 2", 8), ("cores = 12", 12), ("cores = 2\nall_cores = 6", 6),
                                             ("cores = 40\nall_cores = 64", 32)])  # fmt: skip
def test_threads_of_a_target_file(changed, cores, most):
    assert catalogue.load(changed("cores = 4\nall_cores = 4", cores)).cpu.most_threads == most


def test_a_machine_that_nothing_fits(monkeypatch):
    monkeypatch.setattr(catalogue.platform, "machine", lambda: "riscv64")
    with pytest.raises(UsageError, match=r"fits this machine \(riscv64\)"):
        catalogue.load("host")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"unknown target 'raspberypi5'\n  try: did you mean raspberry-pi-5"):
        catalogue.load("raspberypi5")


def test_a_path_is_accepted_wherever_a_name_is(changed):
    path = changed('title = "Raspberry Pi 5"', 'title = "My board"')
    assert catalogue.load(path).title == catalogue.load(str(path)).title == "My board"


def test_a_cost_table(changed):
    costs = """
costs_source = "measured on a Raspberry Pi 5 at 2.4 GHz, 2026-01-01"

[[costs]]
kernel = "tiles"
size = [64, 56, 56]
ms = 1
threads = 4

[[costs]]
kernel = "dense"
size = "resnet18"
ms = 2.5

[cpu]
"""
    target = catalogue.load(changed("[cpu]\n", costs))
    assert [(cost.kernel, cost.size, cost.ms, cost.threads) for cost in target.costs] == [
        ("tiles", [64, 56, 56], 1.0, 4),
        ("dense", "resnet18", 2.5, 1),
    ]


@pytest.mark.parametrize(
    ("old", "new", "key", "why"),
    [
        ("cores = 4", "cores = 0", "cpu.cores", "greater than or equal to 1"),
        ("cores = 4", 'cores = "4"', "cpu.cores", "valid integer"),
        ("cores = 4", "", "cpu.cores", "required"),
        ("cores = 4", "cores = 4\nspeed = 3", "cpu.speed", "not permitted"),
        ("all_cores = 4", "all_cores = 3", "cpu.all_cores", "are no fewer"),
        ("lanes = 4", "lanes = 3", "cpu.lanes", "1, 2, 4, 8 or 16"),
        ('"aarch64-linux-gnu"', '"aarch64 linux"', "cpu.triple", "match pattern"),
        ('"lazy"', '"never"', "conditional", "'lazy' or 'eager'"),
        ("dynamic_shapes = true", "dynamic_shapes = 1", "dynamic_shapes", "valid boolean"),
        ("value = 38.4", "value = -1.0", "peak_gflops_per_core.value", "greater than 0"),
        ("value = 38.4", "value = nan", "peak_gflops_per_core.value", "greater than 0|finite"),
        ("opset = 18", "opset = 9", "runtimes.onnx.opset", "greater than or equal to 13"),
        ("[runtimes.tvm]", "[runtimes.openvino]", "runtimes.openvino", "not permitted"),
        ('"raspberry-pi-5"', '"Raspberry Pi"', "name", "match pattern"),
        ("[cpu]", '[[costs]]\nkernel = "a"\nsize = "b"\nms = 1.0\n\n[cpu]', "costs_source", "measured"),
    ],
)
def test_a_bad_file_gives_file_key_and_reason(changed, old, new, key, why):
    path = changed(old, new)
    with pytest.raises(UsageError) as caught:
        catalogue.load(path)
    message = str(caught.value)
    assert f"bad key '{key}'" in message
    assert f"where: {path}" in message
    assert any(part in caught.value.why for part in why.split("|"))


def test_a_device_without_a_runtime(changed):
    head, _, _ = REAL.partition("[runtimes.onnx]")
    path = changed("", "")
    path.write_text(head + "[runtimes]\n")
    with pytest.raises(UsageError, match=r"bad key 'runtimes'(.|\n)*at least one of onnx, tvm, tflite"):
        catalogue.load(path)


def test_files_that_are_no_target_file(tmp_path):
    with pytest.raises(UsageError, match="no such target file"):
        catalogue.load(tmp_path / "no.toml")
    (tmp_path / "a.toml").write_text("name = \n")
    with pytest.raises(UsageError, match=r"no TOML(.|\n)*line 1, column 8"):
        catalogue.load(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="can't be read"):
        catalogue.load(tmp_path / "b.toml")
    (tmp_path / "c.toml").mkdir()
    with pytest.raises(UsageError, match="can't be read"):
        catalogue.load(tmp_path / "c.toml")


def test_the_example_of_the_documentation(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "adding-a-target.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    assert tomllib.loads(example)
    (tmp_path / "board.toml").write_text(example)
    assert catalogue.load(tmp_path / "board.toml").costs


@pytest.fixture
def rates():
    """Rates of a catalogue entry."""
    return catalogue.load("x86-64-avx512").runtimes["tvm"].rates.f32


def test_rates_are_put_into_a_target_file(tmp_path, rates):
    path = tmp_path / "board.toml"
    path.write_text(target_file.with_measured(REAL, rates))
    loaded = catalogue.load(path)
    assert loaded.runtimes["tvm"].rates.f32 == rates
    assert loaded.runtimes["tflite"] == catalogue.load("raspberry-pi-5").runtimes["tflite"]
    faster = dataclasses.replace(rates, product=0.01, source='measured "here"')
    path.write_text(target_file.with_measured(path.read_text(), faster))
    assert path.read_text().count("[runtimes.tvm.rates.f32]") == 1
    assert catalogue.load(path).runtimes["tvm"].rates.f32 == faster


def test_rates_of_a_file_from_before_there_were_element_types(tmp_path, rates):
    """They are those of f32; what is measured anew takes their place."""
    path = tmp_path / "board.toml"
    path.write_text(target_file.with_measured(REAL, rates).replace("[runtimes.tvm.rates.f32]", "[runtimes.tvm.rates]"))
    assert catalogue.load(path).runtimes["tvm"].rates.f32 == rates
    faster = dataclasses.replace(rates, product=0.01)
    path.write_text(target_file.with_measured(path.read_text(), faster))
    assert path.read_text().count("[runtimes.tvm.rates") == 1
    assert catalogue.load(path).runtimes["tvm"].rates.f32 == faster


@pytest.fixture
def parameters():
    """Unlike those of any instruction set."""
    return Parameters((7, 3), (5, 5), 0, 64, (12, 8), "measured: here")


def test_both_tables_are_put_into_a_target_file(tmp_path, rates, parameters):
    """What the file says of its own stays, and what it has measured before goes."""
    own = REAL.replace("[runtimes.tvm]\n", "[runtimes.tvm]\nwinograd = false\n")
    before = target_file.with_measured(own, rates, parameters)
    text = target_file.with_measured(before, rates, dataclasses.replace(parameters, tall=9))
    assert [text.count(header) for header in ("[runtimes.tvm.rates.f32]", "[runtimes.tvm.parameters]")] == [1, 1]
    (tmp_path / "board.toml").write_text(text)
    tvm = catalogue.load(tmp_path / "board.toml").runtimes["tvm"]
    assert (tvm.winograd, tvm.rates.f32, tvm.parameters) == (False, rates, dataclasses.replace(parameters, tall=9))
    assert target_file.with_measured(text, rates, parameters) == before


def test_rates_need_a_table_of_their_own(rates):
    with pytest.raises(UsageError, match=r"no line \[runtimes.tvm\]"):
        target_file.with_measured(REAL.replace("[runtimes.tvm]", "[runtimes]\ntvm = {}"), rates)


@pytest.mark.parametrize(
    ("old", "new", "key", "why"),
    [
        ("call = ", "call = -", "rates.f32.call", "greater than or equal to 0"),
        ("call = ", "call = nan # ", "rates.f32.call", "finite|greater"),
        ("row = ", "# row = ", "rates.f32.row", "required"),
        ("call = ", "colour = 1.0\ncall = ", "rates.f32.colour", "Unexpected"),
        ("source = ", "# ", "rates.f32.source", "required"),
        ("planes = [7, 3]", "planes = [7]", "parameters.planes.1", "required"),
        ("planes = [7, 3]", "planes = [0, 3]", "parameters.planes.0", "greater than or equal to 1"),
        ("packed = [5, 5]", "packed = [5, 50]", "parameters.packed.1", "less than or equal to 8"),
        ("winograd = [12, 8]", "winograd = []", "parameters.winograd", "at least 1 item"),
        ("tall = 0", "tall = -1", "parameters.tall", "greater than or equal to 0"),
        ("small_plane = 64", "", "parameters.small_plane", "required"),
        ("source = ", "# ", "parameters.source", "required"),
    ],
)
def test_what_is_bad_in_a_measured_table_is_named(tmp_path, rates, parameters, old, new, key, why):
    path = tmp_path / "board.toml"
    header = f"[runtimes.tvm.{'rates.f32' if key.startswith('rates') else 'parameters'}]\n"
    head, table, tail = target_file.with_measured(REAL, rates, parameters).partition(header)
    assert old in tail
    path.write_text(head + table + tail.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        catalogue.load(path)
    assert f"bad key 'runtimes.tvm.{key}'" in str(caught.value)
    assert any(part in caught.value.why for part in why.split("|"))
