"""Checkpoints whose bytes or tensors are no weights: refused by name, with what is wrong."""

from __future__ import annotations

import zipfile

import pytest
import torch

from dvexport.errors import CheckpointError
from dvexport.models.checkpoints.checkpoint import read_checkpoint

GOOD = {"conv.weight": torch.ones(2, 3), "bn.running_var": torch.ones(3)}


def saved(tmp_path, **state):
    path = tmp_path / "w.pth"
    torch.save({**GOOD, **{key.replace("__", "."): value for key, value in state.items()}}, path)
    return path


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    return caught.value


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path):
    path = saved(tmp_path)
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    content = bytearray(path.read_bytes())
    start = content.index(torch.ones(6).numpy().tobytes(), info.header_offset)
    content[start] ^= 1
    path.write_bytes(content)
    error = refusal(path)
    assert "data/0 in it does not match its checksum" in error.why


def test_files_without_checksums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert set(read_checkpoint(path).state) == set(GOOD)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "meta device"),
        (torch.tensor([1 + 2j, float("nan")]), "complex"),
        (torch.ones(4).to(torch.float8_e4m3fn), "float8_e4m3fn; weights have 16, 32 or 64 bits"),
        (torch.ones(1).expand(1 << 20, 1 << 20), "repeats 4 bytes to a shape of [1048576, 1048576]"),
    ],
    ids=["sparse", "meta", "complex", "float8", "expanded"],
)
def test_tensors_that_are_no_weights(tmp_path, value, why):
    error = refusal(saved(tmp_path, odd__weight=value))
    assert error.where.endswith(": odd.weight")
    assert why in error.why


def test_a_variance_below_zero(tmp_path):
    error = refusal(saved(tmp_path, bn__running_var=torch.tensor([1.0, -0.5, 2.0])))
    assert error.where.endswith(": bn.running_var")
    assert "the least of 3 is -0.5" in error.why


def test_halves_and_views_are_weights(tmp_path):
    state = read_checkpoint(saved(tmp_path, half=torch.ones(3).half(), view=torch.arange(12.0)[3:6])).state
    assert state["half"].dtype == torch.float32
    assert state["view"].tolist() == [3, 4, 5]
