"""Reads checkpoints without running anything in them, and writes dvexport's own.

Own checkpoints are safetensors whose metadata key `dvexport` holds JSON: architecture (a zoo name),
settings, preprocess, labels, accuracy. Everything needed to rebuild the model is in the file.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvexport.errors import CheckpointError
from dvexport.files import atomic_write
from dvexport.models.checkpoints.pickles import damaged, load_pickle
from dvexport.models.checkpoints.unwrap import Unwrapped, unwrap

__all__ = ["Checkpoint", "read_checkpoint", "read_metadata", "save_checkpoint"]

_METADATA_KEY = "dvexport"
_LARGEST_HEADER = 100 * 2**20
"""The limit of the safetensors format."""
_VARIANCE = "running_var"
"""What the key of a batch norm's variance ends with."""
_EXPANDED, _SMALL = 1024, 1 << 20
"""Times that a tensor may repeat its bytes, above a size in bytes: a few bytes can stand for any shape."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights as they stand in a file.

    Attributes:
        path: the file.
        state: tensors by key, as float32 where they are floating point, on the CPU.
        metadata: what `save_checkpoint` wrote, None for a foreign file.
        found: how the weights were found in it.
    """

    path: Path
    state: dict[str, Any]
    metadata: dict[str, Any] | None
    found: Unwrapped


def read_checkpoint(path: str | Path, weights_key: str | None = None) -> Checkpoint:
    """Read safetensors, a torch zip file or a legacy torch pickle (torch < 1.6).

    Args:
        weights_key: where the weights stand in a torch file, see `unwrap`.

    Raises:
        UsageError: nothing stands under `weights_key`.
        CheckpointError: if the file is missing, empty, truncated, holds no weights, holds NaN or
            infinite weights, or is a pickle that would run code (which is never run).
    """
    path = Path(path)
    if not path.is_file():
        folder = path.is_dir()
        why = "this is a folder" if folder else "there is no such file"
        hint = f"if save_pretrained wrote it, export the folder itself: dvexport export {path}" if folder else None
        raise CheckpointError("can't read the checkpoint", where=str(path), why=why, hint=hint)
    if path.stat().st_size == 0:
        raise damaged(path, "the file is empty")
    metadata = None
    if _is_safetensors(path):
        content, metadata = _read_safetensors(path), read_metadata(path)
        found = Unwrapped(content) if metadata is not None else unwrap(path, content, weights_key)
    else:
        found = unwrap(path, load_pickle(path), weights_key)
    return Checkpoint(path, _checked(path, found.state), metadata, found)


def _is_safetensors(path: Path) -> bool:
    """Tell by the content: eight bytes of length, then JSON (a zip starts with PK, a pickle with 0x80)."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and start[:2] != b"PK")


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, str(error)) from None


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """Return what `save_checkpoint` wrote about the model, without reading weights (needs no torch).

    None if the safetensors file was written by something else; CheckpointError if it is damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_LARGEST_HEADER, path.stat().st_size):
                raise damaged(path, "its header is longer than the file")
            header = json.loads(file.read(length))
        text = header.get("__metadata__", {}).get(_METADATA_KEY)
        return None if text is None else json.loads(text)
    except OSError as error:
        raise CheckpointError("can't read the checkpoint", where=str(path), why=str(error)) from None
    except (struct.error, ValueError, AttributeError) as error:
        raise damaged(path, str(error)) from None


def _checked(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors as float32; CheckpointError for other things, NaN and infinities."""
    import torch

    checked = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(
                "the checkpoint holds no plain state_dict", where=str(path), why=f"{key!r} stands where a name should"
            )
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                "the checkpoint holds no plain state_dict",
                where=f"{path}: {key}",
                why=f"a {type(value).__name__} stands where a tensor should",
            )
        why = _unusable(value)
        if why is not None:
            raise CheckpointError("the checkpoint holds a tensor that is no weight", where=f"{path}: {key}", why=why)
        if value.is_floating_point():
            value = value.float()
            if key.endswith(_VARIANCE) and value.numel() and value.min() < 0:
                raise CheckpointError(
                    "the checkpoint has a variance below zero",
                    where=f"{path}: {key}",
                    why=f"the least of {value.numel()} is {float(value.min()):.3g}, and batch norm takes its root",
                    hint="the file is damaged: take an earlier checkpoint",
                )
            if not torch.isfinite(value).all():
                bad = int((~torch.isfinite(value)).sum())
                raise CheckpointError(
                    "the checkpoint has NaN or infinite weights",
                    where=f"{path}: {key}",
                    why=f"{bad} of {value.numel()} values are not finite",
                    hint="training diverged, or the file is damaged: take an earlier checkpoint",
                )
        checked[key] = value
    return checked


def _unusable(value: Any) -> str | None:
    """Return why a tensor can't be a weight of ours; None if it can."""
    import torch

    if value.is_meta:
        return "it is on the meta device, so it has a shape and no numbers"
    if value.layout is not torch.strided or value.is_quantized:
        return f"it is {'quantized' if value.is_quantized else 'sparse'}; weights are plain arrays"
    if value.is_complex():
        return f"its numbers are complex ({value.dtype})"
    if value.is_floating_point() and value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"its type is {value.dtype}; weights have 16, 32 or 64 bits"
    if value.numel() * value.element_size() > max(_EXPANDED * value.untyped_storage().nbytes(), _SMALL):
        return f"it repeats {value.untyped_storage().nbytes()} bytes to a shape of {list(value.shape)}"
    return None


def save_checkpoint(path: str | Path, model: Any, *, architecture: str, accuracy: float | None = None) -> None:
    """Write the weights of a `VideoModel` and all that is needed to rebuild it.

    Layers that several blocks share are written once. The file appears whole or not at all.

    Args:
        path: file to write, `.safetensors`.
        model: the model.
        architecture: zoo name that `model.config` belongs to.
        accuracy: top-1 accuracy in 0..1 on its validation set.

    Raises:
        UsageError: if the file can't be written.
    """
    from safetensors.torch import save

    about = {
        "architecture": architecture,
        "settings": dataclasses.asdict(model.config),
        "preprocess": model.preprocess.to_dict(),
        "labels": model.labels,
        "accuracy": accuracy,
    }
    unique = {id(value): key for key, value in reversed(list(model.state_dict(keep_vars=True).items()))}
    state = model.state_dict()
    tensors = {key: state[key].detach().cpu().contiguous() for key in sorted(unique.values())}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={_METADATA_KEY: json.dumps(about)}))
