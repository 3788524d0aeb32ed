"""torch's files, read without running anything in them."""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dvexport.errors import CheckpointError

__all__ = ["Skipped", "damaged", "load_pickle"]

_CHUNK = 1 << 20

_TENSORS = {
    "collections": ("OrderedDict",),
    "torch._utils": ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"),
    "torch": ("Size",),
}
"""What tensors and state_dicts consist of, by module; storages are torch's own matter."""

_HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|(copyreg|copy_reg)\._reconstructor|_codecs\.encode|datetime\..*|pathlib\..*Path|collections\..*"
    r"|(builtins|__builtin__)\.(object|set|frozenset|slice|range|complex|bytearray|dict|list|tuple|int|float|bool|str)"
    r"|torch\.(device|dtype|b?float\d+|int\d+|double|half|long|bool)|numpy\..*|(mmengine|mmcv|yacs|omegaconf|easydict|addict|lightning|lightning_fabric|pytorch_lightning)\..*"
)
"""Classes whose objects stand beside weights: arguments, configurations, logs."""


def damaged(path: Path, why: str) -> CheckpointError:
    """Return the error for a file that is not whole."""
    return CheckpointError(
        "the checkpoint is truncated or damaged", where=str(path), why=why, hint="download or copy it again"
    )


class Skipped:
    """Stands for an object of a class that is not imported: whatever the file does with it, nothing happens.

    Attributes:
        skipped: the name of the class.
    """

    skipped = ""

    def __new__(cls, *_: object, **__: object) -> Skipped:
        """Make one of whatever arguments."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> Skipped:
        """Do nothing."""
        return self

    def __setstate__(self, _state: object) -> None:
        pass

    def __setitem__(self, _key: object, _value: object) -> None:
        pass

    def append(self, _item: object) -> None:
        """Drop an item."""

    def extend(self, _items: object) -> None:
        """Drop items."""

    def add(self, _item: object) -> None:
        """Drop an item."""


def load_pickle(path: Path) -> Any:
    """Return what a torch file holds: tensors, plain containers, and stand-ins for objects of harmless classes.

    torch's restricted unpickler knows tensors and plain containers only. What else training code leaves beside them,
    such as its arguments, is replaced by `Skipped`. No code of the file is run in any case.

    Raises:
        CheckpointError: it is truncated or damaged, or asks for anything that may do something.
    """
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
            raise damaged(path, "it is no pickle, whole or at all") from None
        if unsafe:
            return _load_skipping(path, text)
        raise damaged(path, _first_line(text)) from None
    except PermissionError as error:
        raise CheckpointError("can't read the checkpoint", where=str(path), why=str(error)) from None
    except Exception as error:
        # Damaged bytes make an unpickler raise anything: struct.error, KeyError, UnicodeDecodeError...
        raise damaged(path, _first_line(str(error)) or type(error).__name__) from None


def _check_zip(path: Path) -> None:
    """Compare a zip's members with their checksums, which torch's own reader does not do.

    `torch.serialization.set_crc32_options(False)` writes files in which no checksum is right: those are let through.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.file_size]
            wrong = [info.filename for info in members if not _is_whole(archive, info)]
    except Exception:
        return  # no zip, or its list is damaged: torch tells
    if wrong and len(wrong) < len(members):
        raise damaged(path, f"{wrong[0]} in it does not match its checksum")


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


def _load_skipping(path: Path, refused: str) -> Any:
    """Load with a stand-in for every harmless class; CheckpointError, as torch's `refused` says, for any other."""
    import torch

    asked: list[str] = []

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if name in _TENSORS.get(module, ()):
                return super().find_class(module, name)
            whole = f"{module}.{name}"
            if not _HARMLESS.fullmatch(whole):
                asked.append(whole)
                raise pickle.UnpicklingError(f"GLOBAL {whole}")
            return type("Skipped", (Skipped,), {"skipped": whole})

    reader = ModuleType("reader")
    reader.__dict__.update(
        {**pickle.__dict__, "Unpickler": Unpickler, "load": lambda file, **how: Unpickler(file, **how).load()}
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)
    except Exception as error:  # as in load_pickle
        if asked:
            raise _unsafe(path, f"GLOBAL {asked[0]}") from None
        if isinstance(error, pickle.UnpicklingError):
            raise _unsafe(path, refused) from None
        raise damaged(path, _first_line(str(error)) or type(error).__name__) from None
