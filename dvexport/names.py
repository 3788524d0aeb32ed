"""Names that are legal: of gates and states, of modes, of activations; and texts as a terminal may have them."""

from __future__ import annotations

import re

__all__ = ["ACTIVATIONS", "MODES", "name_problem", "printable"]

MODES = ("stream", "clip")
"""How an artifact takes frames. `stream`: one frame a step, explicit state in and out. `clip`: all frames at once."""

ACTIVATIONS = ("none", "relu")
"""What a gated convolution may end with; for code that runs without torch."""

_NAME = re.compile(r"[A-Za-z0-9_./:-]{1,100}")


def printable(text: object) -> str:
    """Return a text from outside, such as a label, as one line in which a terminal finds nothing to obey."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def name_problem(name: object) -> str | None:
    """Return what is wrong with the name of a gate or a state, or None.

    Names are keys of bundles and of `--lowering`, where `=`, `,` and `*` have a meaning.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"{name!r} is no name: 1 to 100 letters, digits and . _ - : / are"
    return None
