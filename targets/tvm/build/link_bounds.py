"""What kernels state that they touch, as C text for the library's kernel table; `runtime/bounds.c` reads it."""

from __future__ import annotations

from dvexport.targets.tvm.kernels.bounds import Contract, Made, Size, c_text

__all__ = ["bounds_source"]


def bounds_source(contract: Contract, number: int) -> list[str]:
    """Return lines that define `buffers<number>`, an array, and `bounds<number>`, the function that checks a call."""
    numbers = {name: index for index, (name, _) in enumerate(contract.buffers)}
    rows = []
    for _, buffer in contract.buffers:
        over = sum(1 << numbers[name] for name in buffer.over)
        align = buffer.bytes if buffer.scattered else 64
        rows.append(
            f"{{{buffer.bytes}, {align}, {int(buffer.written)}, {over}u, {int(buffer.reads)}, {buffer.pieces}}}"
        )

    def text(expr: Size) -> str:
        return c_text(expr, numbers)

    def made(each: Made) -> str:
        known = ", ".join(map(text, (each.count, each.limit, each.inputs, each.pieces)))
        return f"    dvx_makes(b, {numbers[each.buffer]}, {int(each.kind)}, {known});"

    return [
        f"static const buffer_entry buffers{number}[] = {{{', '.join(rows)}}};",
        f"static void bounds{number}(bounds *b) {{",
        *(f"    dvx_touches(b, {i}, {text(buffer.elements)});" for i, (_, buffer) in enumerate(contract.buffers)),
        *(f"    dvx_needs(b, {text(less)}, {text(more)});" for less, more in contract.needs),
        *map(made, contract.makes),
        "}",
    ]
