"""What `dvexport tune` measured, in a target file."""

from __future__ import annotations

import json
import re

from dvexport.errors import UsageError
from dvexport.targets.tvm.machine.dtype import F32
from dvexport.targets.tvm.machine.rates import Parameters, Rates

__all__ = ["measured_table", "with_measured"]

_TABLES = {
    Rates: (f"[runtimes.tvm.rates.{F32}]", "[runtimes.tvm.rates]"),
    Parameters: ("[runtimes.tvm.parameters]",),
}
"""Tables that are written, and where they once stood."""


def measured_table(measured: Rates | Parameters) -> str:
    """Return the table of a target file that says what `dvexport tune` measured, rates to four digits."""
    lines = [f"{name} = {_as_toml(value)}" for name, value in measured.values().items()]
    source = f"source = {json.dumps(measured.source, ensure_ascii=False)}"
    return "\n".join([_TABLES[type(measured)][0], source, *lines, ""])


def _as_toml(value: float | tuple[int, ...]) -> str:
    if isinstance(value, float):
        return str(float(f"{value:.4g}"))
    return str(list(value) if isinstance(value, tuple) else value)


def with_measured(text: str, *measured: Rates | Parameters) -> str:
    """Return the text of a target file with these tables, in place of those it has.

    Args:
        text: the text of a file with `[runtimes.tvm]`.
        measured: what was measured on the device.

    Raises:
        UsageError: compiled kernels are not among its runtimes, or it says so in another way.
    """
    for each in measured:
        for table in _TABLES[type(each)]:
            text = re.sub(rf"^{re.escape(table)}\n(?:(?!\[).*\n?)*", "", text, flags=re.MULTILINE)
    head, line, tail = text.partition("[runtimes.tvm]\n")
    if not line:
        raise UsageError("the target file has no line [runtimes.tvm]", hint="add it, and run this again")
    own, bracket, others = tail.partition("[")
    tables = "\n".join(measured_table(each) for each in measured)
    return f"{head}{line}{own.strip()}".rstrip() + f"\n\n{tables}\n{bracket}{others}".rstrip() + "\n"
