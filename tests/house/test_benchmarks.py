"""What the benchmarks' figures rest on: turns, budgets, worker processes, and what counts as gating."""

from __future__ import annotations

import re
import struct
import tomllib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import __main__ as program
from benchmarks import instructions
from benchmarks.adapters import ADAPTERS, missing
from benchmarks.document import DOCS, replace_block
from benchmarks.static import _solve
from benchmarks.timing import interleave, take_turns
from benchmarks.worker import FAILED, READY, Worker

ROOT = Path(__file__).parents[2]


def test_sides_take_turns_and_every_first_call_is_not_counted():
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "aabb" * 3
    assert all(len(timing.samples_ms) == 3 for timing in timings.values())


def test_a_speedup_is_the_median_of_the_ratios_of_a_round():
    slow, fast = iter([4.0, 30.0, 6.0]), iter([2.0, 3.0, 3.0])
    timings = take_turns({"slow": lambda: next(slow), "fast": lambda: next(fast)}, rounds=3)
    assert timings["fast"].speedup_over(timings["slow"]) == 2
    assert timings["slow"].median == 6000


def test_the_rate_of_a_budget_is_found():
    assert _solve(lambda rate: rate * rate, 0.25) == pytest.approx(0.5, abs=1e-3)
    assert round(_solve(lambda rate: round(7 * rate) / 7, 0.45) * 7) == 3


def test_every_suite_has_its_place_in_the_document():
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    blocks = {*program._SUITES} - {"tokens"} | {f"tokens-{name}" for name in program._TRANSFORMERS}
    assert all(re.search(f"<!-- {block} -->.*<!-- /{block} -->", text, re.DOTALL) for block in blocks)


def test_tables_without_a_place_are_an_error(tmp_path):
    path = tmp_path / "document.md"
    path.write_text("<!-- here -->\nold\n<!-- /here -->\n", encoding="utf-8")
    replace_block(path, "here", "new")
    assert path.read_text(encoding="utf-8") == "<!-- here -->\n\nnew\n\n<!-- /here -->\n"
    with pytest.raises(LookupError, match="no place for the tables 'there'"):
        replace_block(path, "there", "new")


def test_every_peer_can_be_installed_with_an_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    listed = [project["name"], *project["dependencies"], *extras["bench"], *extras["tvm"], "ai-edge-litert"]
    declared = {re.split(r"[<>=!~\[]", text)[0] for text in listed}  # litert-torch brings ai-edge-litert
    assert {package for adapter in ADAPTERS.values() for package in adapter.packages} <= declared


def test_a_package_that_is_not_installed_is_named():
    class Absent:
        packages = ("numpy", "no-such-runtime")

    assert missing(Absent) == ["no-such-runtime"]


@pytest.fixture
def network(tmp_path) -> Path:
    """A folder with a network that doubles its input, as `static.write_static` leaves it."""
    x = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    value = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Add", [value, value])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", value.shape, value.type
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20}, name="double")
    ir.save(ir.Model(graph, ir_version=10), str(tmp_path / "model.onnx"))
    np.save(tmp_path / "input.npy", x)
    np.save(tmp_path / "want.npy", 2 * x)
    return tmp_path


def test_a_worker_checks_its_result_and_times_itself(network):
    worker = Worker("ONNX Runtime", network, threads=1)
    try:
        assert (worker.state, worker.why, worker.error) == (READY, "", 0)
        assert all(0 < worker.measure() < 1 for _ in range(3))
    finally:
        worker.close()


def test_a_worker_that_can_not_load_the_network_says_why(network):
    (network / "model.onnx").write_bytes(b"damaged")
    worker = Worker("ONNX Runtime", network, threads=1)
    assert worker.state == FAILED
    assert "model.onnx" in worker.why


def test_a_result_that_differs_is_not_timed(network):
    peers = pytest.importorskip("benchmarks.peers")
    np.save(network / "want.npy", 2.01 * np.load(network / "input.npy"))
    worker = Worker("ONNX Runtime", network, threads=1)
    try:
        assert not peers._is_right(worker)
        assert "differ" in worker.why
    finally:
        worker.close()


def test_calls_are_told_apart_by_what_they_are_for():
    native = pytest.importorskip("benchmarks.native")
    always = frozenset({"conv stem", "gemm head"})

    def purpose(label: str, *, gate: str = "", rows: int | None = None) -> str:
        return native._purpose(native.CallTime(label, gate, "kernel", 1e-6, 1, (rows, None, None)), always)

    assert purpose("conv stem") == purpose("gemm head") == purpose("max_pool x") == "always on"
    assert purpose("conv v", gate="layer1.0", rows=0) == "convolutions"
    assert purpose("conv of a policy", gate="layer1.0") == purpose("gemm relu_3") == "policies"
    assert purpose("list action") == purpose("mask tiles") == "lists"
    assert purpose("merge u") == "merges"
    assert purpose("copy y") == purpose("pad y") == "copies"


def test_machine_code_of_an_object_is_counted():
    artifacts = pytest.importorskip("benchmarks.artifacts")
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x28, 64)
    struct.pack_into("<HH", header, 0x3A, 64, 3)
    sections = [(flags, size) for flags, size in ((0x6, 100), (0x2, 50), (0x6, 7))]
    rows = [struct.pack("<IIQQQQIIQQ", 0, 1, flags, 0, 0, size, 0, 0, 0, 0) for flags, size in sections]
    assert artifacts.text_bytes(bytes(header) + b"".join(rows)) == 107


@pytest.mark.slow
def test_transformers_that_drop_tokens_are_timed_beside_dense_ones_on_every_backend():
    from benchmarks.tokens import COLUMNS, token_rows

    rows = token_rows("vit_motion", (4, 8), ("onnx", "tvm"), (1,), rounds=1)
    assert [(row["r"], row["backend"]) for row in rows] == [(4, "onnx"), (8, "onnx"), (4, "tvm"), (8, "tvm")]
    for row in rows:
        assert set(row) == set(COLUMNS)
        assert 0 < float(row["choosing"].rstrip("%")) < 60
        assert float(row["FLOP ratio"]) == pytest.approx({4: 1.38, 8: 2.13}[row["r"]], abs=0.01)
        assert (row["dense over ORT's"] == "-") == (row["backend"] == "onnx")


def test_instructions_are_set_against_the_work_asked_for():
    row = instructions._row("direct", "both 50%", 0.5, 60, 100, 400.0)
    assert row == dict(zip(instructions.COLUMNS, ("direct", "both 50%", 0.5, 0.0, 0.3, 0.6, 1.2), strict=True))
