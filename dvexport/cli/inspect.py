"""`dvexport inspect`: what a bundle says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dvexport.cli.export import memory_line, origin_lines
from dvexport.cli.options import bundle_argument, json_flag
from dvexport.cli.output import file_size, print_fields, print_json, print_table

if TYPE_CHECKING:
    from dvexport.bundle.manifest import GateEntry, Manifest

__all__ = ["inspect"]


@click.command()
@bundle_argument
@json_flag
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what is in a bundle: model, inputs, states, gates, files.

    Every byte of it is checked against its digest first. None of its code runs.
    """
    from dvexport.bundle.archive import Bundle

    manifest = Bundle.open(bundle).manifest
    if as_json:
        print_json({**manifest.model_dump(mode="json"), "code": _code(manifest)})
        return
    _summary(manifest)
    if manifest.states:
        click.echo()
        print_table(
            ("state", "type", "shape", "at first", "next"),
            [
                (s.name, s.dtype, _shape(s.shape), s.init, "in place" if s.in_place else "apart")
                for s in manifest.states
            ],
        )
    if manifest.gates:
        tokens = any(gate.tokens for gate in manifest.gates)
        click.echo()
        print_table(
            ("gate", "kind", "channels", "tiles", *(("tokens",) if tokens else ()), "lowering", "never seen", "reason"),
            [_gate(gate, tokens) for gate in manifest.gates],
            right=("channels", "tiles", *(("tokens",) if tokens else ())),
        )
    click.echo()
    rows = [(name, file_size(entry.size)) for name, entry in sorted(manifest.files.items())]
    print_table(("file", "size"), [*rows, ("bundle", file_size(bundle.stat().st_size))], right=("size",))


def _summary(manifest: Manifest) -> None:
    from dvexport.models.checkpoints.untold import as_settings

    video = manifest.preprocess
    origins = [line.partition(": ")[::2] for line in origin_lines(manifest.model)]
    settings = "" if origins else " ".join(as_settings(dict(sorted(manifest.model.settings.items()))))
    print_fields(
        [
            ("model", f"{manifest.model.name} {settings}".rstrip()),
            *origins,
            ("target", manifest.target),
            ("backend", manifest.backend),
            ("mode", manifest.mode),
            *(("input", f"{i.name} {i.dtype} {_shape(i.shape)}") for i in manifest.inputs),
            *(("output", f"{o.name} {o.dtype} {_shape(o.shape)}") for o in manifest.outputs),
            (
                "video",
                f"short side {video.resize}, crop {_shape(video.size)}, {video.colour_order}, "
                f"{video.frames} frames {video.sampling}, "
                + (f"{video.frame_rate:g} frames/s" if video.frame_rate else "any frame rate"),
            ),
            *(("memory", line.removeprefix("memory: ")) for line in memory_line(manifest.memory)),
            ("labels", str(len(manifest.labels))),
            *((("left out", f"{', '.join(sorted(manifest.left_out))} (slim)"),) if manifest.left_out else ()),
            ("code", _code(manifest)),
            ("checkpoint", manifest.checkpoint or "none given"),
            ("made with", " ".join(f"{name} {version}" for name, version in sorted(manifest.tools.items()))),
        ]
    )


def _code(manifest: Manifest) -> str:
    """Say whether a bundle's native code would be run here."""
    from dvexport.bundle.trust import has_code, made_here

    if not has_code(manifest):
        return "none"
    return "made here by you: runs" if made_here(manifest) else "not made here by you: runs only with --trust"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _gate(gate: GateEntry, tokens: bool) -> tuple[str, ...]:
    reason = f"{gate.reason} (overruled)" if gate.overridden else gate.reason
    grid = _shape(gate.grid) if gate.grid else "-"
    kept = f"{gate.tokens[0]} of {gate.tokens[1]}" if gate.tokens else "-"
    size = (str(gate.channels), grid, *((kept,) if tokens else ()))
    return gate.name, gate.kind, *size, gate.lowering, _never_seen(gate), reason


def _never_seen(gate: GateEntry) -> str:
    """Return what the export's comparisons have not seen of a gate."""
    from dvexport.run.seen import GateSeen, titles

    if gate.seen is None:
        return "unknown"
    return ", ".join(titles(GateSeen(gate.name, gate.kind, gate.seen).missing)) or "-"
