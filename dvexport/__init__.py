"""Export trained dynamic video models so that the work their gates skip is really skipped.

    settings = {"shift": "none", "frames": 8}
    bundle = dvexport.export(
        "dstep_resnet18", checkpoint="best.pth", settings=settings, assume_defaults=True, output="model.dvx"
    )
    session = dvexport.open_session(dvexport.Bundle.open("model.dvx"))

Everything is imported on first use: importing dvexport costs nothing, and running a bundle needs no torch.
"""

from __future__ import annotations

import sys

if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].removeprefix("-m").partition(".")[0] == "dvexport"
    and not sys.flags.safe_path
):
    # Python looks for what `-m` names, the working folder first on its path. That may be a stranger's: nothing of ours,
    # and nothing that ours imports, is to come from there.
    del sys.path[0]

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvexport.bundle.archive import Bundle
    from dvexport.errors import DvexportError
    from dvexport.export import export
    from dvexport.ports import Output
    from dvexport.run.open import open_session
    from dvexport.run.run import run
    from dvexport.run.session import Session
    from dvexport.verify import verify

__all__ = ["Bundle", "DvexportError", "Output", "Session", "export", "open_session", "run", "verify"]

_HOMES = {
    "Bundle": "dvexport.bundle.archive",
    "DvexportError": "dvexport.errors",
    "Output": "dvexport.ports",
    "Session": "dvexport.run.session",
    "export": "dvexport.export",
    "open_session": "dvexport.run.open",
    "run": "dvexport.run.run",
    "verify": "dvexport.verify",
}


class _Package(ModuleType):
    """Keeps `dvexport.export` the function where importing the module of that name would hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dvexport' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
