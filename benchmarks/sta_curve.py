"""Accuracy and latency of a trained video transformer against r, for STA and for tokens dropped at random.

    python -m benchmarks.sta_curve [MODEL] [--checkpoint FILE] [--r R ...] [--clips N] [--rounds N] [--write]

Each row is a clip-mode artifact of its own. Its predictions are compared with PyTorch's on every clip, and
it is timed in turn with all the others. Accuracy of random drop is the mean over `--seeds` choices of
tokens; PyTorch alone scores all but the first. `--write` puts table and curve into docs/training.md. Exit
code 1 if export changed a prediction.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dvexport
from benchmarks.document import DOCS, markdown_table, replace_block
from benchmarks.timing import Timing, take_turns
from dvexport import gates
from dvexport.dialect.flops import FlopTable
from dvexport.models import zoo
from dvexport.models.training.evaluate import batches, normalised
from dvexport.models.training.motion import MotionDataset
from dvexport.run.open import open_session
from dvexport.run.session import Session

__all__ = ["COLUMNS", "Point", "curve", "draw", "measure"]

COLUMNS = ("method", "r", "tokens", "GMACs", "accuracy", "predictions changed", "ms", "spread", "speed-up")


@dataclass(frozen=True)
class Point:
    """One model of the curve.

    Attributes:
        method: `sta` or `random`.
        r: tokens dropped in each group.
        tokens: that are left in the end.
        gmacs: what the artifact executes for a clip.
        accuracy: in 0..1 before export; of random drop, the mean over its seeds.
        changed: predictions that export changed.
        time: how long a clip takes.
        speedup: over r = 0.
    """

    method: str
    r: int
    tokens: int
    gmacs: float
    accuracy: float
    changed: int
    time: Timing
    speedup: float

    def row(self) -> dict[str, Any]:
        """Return a row of the table."""
        return {
            "method": self.method, "r": self.r, "tokens": self.tokens, "GMACs": f"{self.gmacs:.4f}",
            "accuracy": f"{self.accuracy:.1%}", "predictions changed": self.changed,
            "ms": f"{self.time.median:.2f}", "spread": f"{self.time.spread:.0%}", "speed-up": f"{self.speedup:.2f}",
        }  # fmt: skip


def main() -> int:
    """Measure the curve; print it, and write it if asked."""
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=about, epilog=details)
    parser.add_argument("model", nargs="?", default="vit_motion")
    parser.add_argument("--checkpoint", help="weights, where MODEL has none of its own")
    parser.add_argument("--r", type=int, nargs="+", default=[0, 2, 4, 6, 8])
    parser.add_argument("--clips", type=int, default=None, help="all of the validation set when left out")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="choices of the random drop")
    parser.add_argument("--backend", default="onnx", choices=["onnx", "tvm"])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    points = measure(
        arguments.model, arguments.r, checkpoint=arguments.checkpoint, clips=arguments.clips, rounds=arguments.rounds,
        threads=arguments.threads, seeds=arguments.seeds, backend=arguments.backend,
    )  # fmt: skip
    table = markdown_table(COLUMNS, [point.row() for point in points])
    print(table)
    if arguments.write:
        picture = DOCS / "curves" / f"{arguments.model}_r.svg"
        picture.write_text(draw(points), encoding="utf-8")
        replace_block(DOCS / "training.md", "sta-curve", f"{table}\n\n![Curve](curves/{picture.name})")
    return int(any(point.changed for point in points))


def measure(
    model: str,
    drops: Sequence[int],
    *,
    checkpoint: str | None = None,
    clips: int | None = None,
    rounds: int = 30,
    threads: int = 1,
    seeds: int = 3,
    backend: str = "onnx",
) -> list[Point]:
    """Return the points of the curve, `sta` first, each by ascending r; r = 0 stands in both.

    Args:
        model: a video transformer of the zoo that was trained on the motion data.
        drops: values of r; 0 is always measured.
        checkpoint: weights of an architecture.
        clips: how many of the validation set to use; all by default.
        rounds: how many the interleaved timing has.
        threads: how many each artifact runs with.
        seeds: over how many choices of tokens the accuracy of random drop is averaged.
        backend: `onnx` or `tvm`.

    Raises:
        UsageError: an r that the model can't take.
    """
    values = sorted({0, *drops})
    cells = [("sta", r) for r in values] + [("random", r) for r in values if r]
    scores: dict[tuple[str, int], tuple[float, int, int]] = {}
    sessions: dict[str, Session] = {}
    gmacs: dict[tuple[str, int], float] = {}
    plain = zoo.create(model, checkpoint, assume_defaults=True)
    frames, labels = _validation(plain, clips)
    with tempfile.TemporaryDirectory() as folder:
        for method, r in cells:
            settings = {"sta_r": r, "sta_method": method}
            net = zoo.create(model, checkpoint, assume_defaults=True, **settings)
            bundle = dvexport.export(
                model, checkpoint=checkpoint, settings=settings, assume_defaults=True, backend=backend, mode="clip",
                output=Path(folder) / f"{method}_{r}.dvx",
            )  # fmt: skip
            session = sessions[f"{method} {r}"] = open_session(bundle, threads=threads)
            table = FlopTable.from_dict(bundle.manifest.flops)
            gmacs[method, r] = (table.fixed + table.decisions) / 1e9
            expected = _predictions(net, frames)
            found = torch.tensor([int(session.run_clip(clip.numpy())[-1].logits.argmax()) for clip in frames])
            others = range(1, seeds) if method == "random" else ()
            more = [
                _predictions(zoo.create(model, checkpoint, assume_defaults=True, **settings, sta_seed=seed), frames)
                for seed in others
            ]
            accuracy = float(torch.stack([p == labels for p in (expected, *more)]).float().mean())
            with torch.no_grad():
                tokens = net.tokens(frames[0]).shape[1]
            scores[method, r] = accuracy, int((found != expected).sum()), tokens
        clip = frames[0].numpy()
        times = take_turns({name: lambda run=run: _seconds(run, clip) for name, run in sessions.items()}, rounds)  # type: ignore[misc]
    dense = times["sta 0"]
    points = []
    for method, r in cells:
        accuracy, changed, tokens = scores[method, r]
        time = times[f"{method} {r}"]
        points.append(Point(method, r, tokens, gmacs[method, r], accuracy, changed, time, time.speedup_over(dense)))
    return points


def _validation(net: Any, clips: int | None) -> tuple[Tensor, Tensor]:
    """Return clips of the validation set, normalised `[clips, T, 3, H, W]`, and their labels."""
    data = MotionDataset("validation", net.preprocess.size[0], net.preprocess.frames)
    count = len(data) if clips is None else min(clips, len(data))
    parts = [data.batch(part) for part in batches(range(count), 32)]
    frames = torch.cat([normalised(frames, net).unflatten(0, frames.shape[:2]) for frames, _ in parts])
    return frames, torch.cat([labels for _, labels in parts])


@torch.no_grad()
def _predictions(net: Any, frames: Tensor) -> Tensor:
    with gates.frames_per_clip(frames.shape[1]):
        return torch.cat([net(part.flatten(0, 1)).argmax(1) for part in frames.split(32)])


def _seconds(session: Session, frames: np.ndarray) -> float:
    """Return the seconds of a clip, after one that is not counted."""
    session.run_clip(frames)
    return float(session.run_clip(frames)[-1].seconds)


def curve(points: Sequence[Point], method: str) -> list[tuple[float, float, int]]:
    """Return the (ms, accuracy, r) of a method, r = 0 first; both methods share that one."""
    return [(p.time.median, p.accuracy, p.r) for p in points if p.method == method or p.r == 0]


def draw(points: Sequence[Point]) -> str:
    """Return an SVG: accuracy over latency, a line a method, r beside each point."""
    width, height, left, bottom = 520, 320, 60, 45
    slowest = 1.05 * max(point.time.median for point in points)

    def place(ms: float, accuracy: float) -> tuple[float, float]:
        return left + (width - left - 20) * ms / slowest, 15 + (height - bottom - 15) * (1 - accuracy)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = place(0, share)[1]
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 20}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for part in (0, 0.25, 0.5, 0.75, 1):
        x = place(part * slowest, 0)[0]
        parts.append(f'<text x="{x:.1f}" y="{height - 26}" text-anchor="middle">{part * slowest:.1f}</text>')
    parts.append(f'<text x="{(width + left) / 2}" y="{height - 8}" text-anchor="middle">latency of a clip, ms</text>')
    for row, (method, colour) in enumerate((("sta", "#1f77b4"), ("random", "#d62728"))):
        line = [(*place(ms, accuracy), r) for ms, accuracy, r in curve(points, method)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, r in line:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
            parts.append(f'<text x="{x + 5:.1f}" y="{y - 6 + 18 * row:.1f}" fill="{colour}">r={r}</text>')
        parts.append(f'<text x="{left + 12}" y="{height - bottom - 30 + 16 * row}" fill="{colour}">{method}</text>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    sys.exit(main())
