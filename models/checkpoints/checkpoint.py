"""Reads checkpoints without running anything in them, and writes dvexport's own.

Own checkpoints are safetensors whose metadata key `dvexport` holds JSON: architecture (a zoo name),
settings, preprocess, labels, accuracy. Everything needed to rebuild the model is in the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvexport.errors import CheckpointError
from dvexport.files import atomic_write

__all__ = ["Checkpoint", "read_checkpoint", "read_metadata", "save_checkpoint"]

_METADATA_KEY = "dvexport"
_LARGEST_HEADER = 100 * 2**20
"""The limit of the safetensors format."""
_WRAPPERS = ("state_dict", "model_state", "model", "module")
"""Keys under which training code puts the weights, in the order they are tried."""
_VARIANCE = "running_var"
"""What the key of a batch norm's variance ends with."""
_CHUNK = 1 << 20
_EXPANDED, _SMALL = 1024, 1 << 20
"""Times that a tensor may repeat its bytes, above a size in bytes: a few bytes can stand for any shape."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights as they stand in a file.

    Attributes:
        path: the file.
        state: tensors by key, as float32 where they are floating point, on the CPU.
        metadata: what `save_checkpoint` wrote, None for a foreign file.
    """

    path: Path
    state: dict[str, Any]
    metadata: dict[str, Any] | None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read safetensors, a torch zip file or a legacy torch pickle (torch < 1.6).

    Raises:
        CheckpointError: if the file is missing, empty, truncated, holds no weights, holds NaN or
            infinite weights, or is a pickle that would run code (which is never run).
    """
    path = Path(path)
    if not path.is_file():
        why = "this is a folder" if path.is_dir() else "there is no such file"
        raise CheckpointError("can't read the checkpoint", where=str(path), why=why)
    if path.stat().st_size == 0:
        raise _damaged(path, "the file is empty")
    metadata = None
    if _is_safetensors(path):
        state, metadata = _read_safetensors(path), read_metadata(path)
    else:
        state = _unwrap(path, _load_pickle(path))
    return Checkpoint(path, _checked(path, state), metadata)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint is truncated or damaged", where=str(path), why=why, hint="download or copy it again"
    )


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
        raise _damaged(path, str(error)) from None


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """Return what `save_checkpoint` wrote about the model, without reading weights (needs no torch).

    None if the safetensors file was written by something else; CheckpointError if it is damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_LARGEST_HEADER, path.stat().st_size):
                raise _damaged(path, "its header is longer than the file")
            header = json.loads(file.read(length))
        text = header.get("__metadata__", {}).get(_METADATA_KEY)
        return None if text is None else json.loads(text)
    except OSError as error:
        raise CheckpointError("can't read the checkpoint", where=str(path), why=str(error)) from None
    except (struct.error, ValueError, AttributeError) as error:
        raise _damaged(path, str(error)) from None


def _load_pickle(path: Path) -> Any:
    """Load with torch's restricted unpickler, which knows tensors and plain containers only."""
    import torch

    _check_zip(path)
    try:
        with _numpy_scalars_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of in a damaged file is an error here
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        unsafe = any(word in text for word in ("Unsupported", "GLOBAL", "safe_globals", "unrecognized function"))
        if not _holds_pickle(path):
            raise _damaged(path, "it is no pickle, whole or at all") from None
        if unsafe:
            raise _unsafe(path, text) from None
        raise _damaged(path, _first_line(text)) from None
    except PermissionError as error:
        raise CheckpointError("can't read the checkpoint", where=str(path), why=str(error)) from None
    except Exception as error:
        # Damaged bytes make an unpickler raise anything: struct.error, KeyError, UnicodeDecodeError...
        raise _damaged(path, _first_line(str(error)) or type(error).__name__) from None


def _check_zip(path: Path) -> None:
    """Compare a zip's members with their checksums, which torch's own reader does not do.

    `torch.serialization.set_crc32_options(False)` writes files in which no checksum is right: those are let through.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.file_size]
            damaged = [info.filename for info in members if not _is_whole(archive, info)]
    except Exception:
        return  # no zip, or its list is damaged: torch tells
    if damaged and len(damaged) < len(members):
        raise _damaged(path, f"{damaged[0]} in it does not match its checksum")


def _is_whole(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(info) as member:
            while member.read(_CHUNK):
                pass
    except Exception:
        # Damaged bytes make a parser raise anything: BadZipFile, zlib.error, UnicodeDecodeError...
        return False
    return True


def _holds_pickle(path: Path) -> bool:
    """Tell a pickle, in a zip or not, from bytes that are none; nothing of it is run."""
    if zipfile.is_zipfile(path):
        return True
    try:
        with path.open("rb") as file:
            return sum(1 for _ in pickletools.genops(file)) > 0
    except Exception:
        # As above: damaged bytes make a parser raise anything.
        return False


def _unsafe(path: Path, text: str) -> CheckpointError:
    name = re.search(r"(?:GLOBAL|built-in function|function) ([\w.]+)", text)
    return CheckpointError(
        "refused to load the checkpoint: it is a pickle that would run code",
        where=str(path),
        why=f"it asks for {name[1]}, which is no tensor" if name else "it asks for more than tensors",
        hint="save only the state_dict: torch.save(model.state_dict(), FILE), or use safetensors",
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


@contextlib.contextmanager
def _numpy_scalars_allowed() -> Iterator[None]:
    """Allow numpy numbers: official TSM files hold the best accuracy as one (under numpy 1's name)."""
    import _codecs

    import numpy as np
    import torch

    scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]
    allowed: list[Any] = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        type(np.dtype(np.float64)),
        type(np.dtype(np.float32)),
        type(np.dtype(np.int64)),
        (_codecs.encode, "_codecs.encode"),
    ]
    with torch.serialization.safe_globals(allowed):
        yield


def _unwrap(path: Path, content: Any) -> dict[str, Any]:
    """Return the mapping of keys to tensors inside what training code saved around it."""
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            _check_alone(path, key, content)
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            "the checkpoint holds no weights",
            where=str(path),
            why=f"it holds a {type(content).__name__}, not a state_dict",
        )
    return content


def _check_alone(path: Path, key: str, content: dict[str, Any]) -> None:
    """Raise CheckpointError if a second set of the same weights lies beside `content[key]`, such as an average."""
    names = {name.removeprefix("module.") for name in content[key] if isinstance(name, str)}
    for other, value in content.items():
        if other == key or not isinstance(value, dict):
            continue
        shared = [name for name in value if isinstance(name, str) and name.removeprefix("module.") in names]
        if 2 * len(shared) > len(names):
            raise CheckpointError(
                "the checkpoint holds two sets of weights, and nothing tells which is meant",
                where=str(path),
                why=f"{key} and {other} have the same keys",
                hint=f"save one of them to a file of its own: torch.save(torch.load(FILE)['{other}'], NEW)",
            )


def _checked(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors as float32; CheckpointError for other things, NaN and infinities."""
    import torch

    checked = {}
    for key, value in state.items():
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
