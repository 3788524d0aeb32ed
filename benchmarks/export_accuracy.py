"""Check that export changes no prediction: every clip of the validation set, PyTorch against the artifact.

    python -m benchmarks.export_accuracy [--models NAME ...] [--clips N] [--write]

`--write` puts the table between the markers of docs/training.md. Exit code 1 if a prediction changed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass

import numpy as np
import torch

import dvexport
from benchmarks.document import DOCS, replace_block
from dvexport.dialect.flops import FlopTable
from dvexport.models import zoo
from dvexport.models.training.evaluate import normalised
from dvexport.models.training.motion import MotionDataset
from dvexport.run.open import open_session

MODELS = ("tsn_motion", "tsm_motion", "dstep_motion_d60", "dstep_motion_d40")
HEADER = (
    "| model | clips | accuracy before | after export | predictions changed | GMAC/frame of the artifact |\n"
    "|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Comparison:
    """One model over the validation set."""

    model: str
    before: np.ndarray
    after: np.ndarray
    truth: np.ndarray
    gmacs: float

    @property
    def changed(self) -> int:
        """How many predictions differ."""
        return int((self.before != self.after).sum())

    def row(self) -> str:
        """Return a row of the table."""
        before, after = ((p == self.truth).mean() for p in (self.before, self.after))
        return (
            f"| `{self.model}` | {len(self.truth)} | {before:.2%} | {after:.2%} | {self.changed} | {self.gmacs:.4f} |"
        )


def main() -> int:
    """Compare every model; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--clips", type=int, default=None, help="all of the validation set when left out")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    found = [compare(name, arguments.clips) for name in arguments.models]
    table = "\n".join([HEADER, *[comparison.row() for comparison in found]])
    print(table)
    if arguments.write:
        replace_block(DOCS / "training.md", "export-table", table)
    return int(any(comparison.changed for comparison in found))


@torch.no_grad()
def compare(name: str, clips: int | None = None) -> Comparison:
    """Run the validation set through the model and through its exported stream, from reset for every clip."""
    model = zoo.create(name).eval()
    dataset = MotionDataset("validation", model.preprocess.size[0], model.preprocess.frames)
    count = len(dataset) if clips is None else min(clips, len(dataset))
    with tempfile.TemporaryDirectory() as folder:
        bundle = dvexport.export(name, target="host", backend="onnx", mode="stream", output=f"{folder}/{name}.dvx")
        session = open_session(bundle, threads=1)
        table = FlopTable.from_dict(bundle.manifest.flops)
        rows: list[tuple[int, int, int, float]] = []
        for index in range(count):
            frames, label = dataset.batch([index])
            ready = normalised(frames, model)
            expected = int(model(ready)[-1].argmax())
            steps = session.run_clip(ready.numpy())
            macs = float(np.mean(table.executed([step.decisions for step in steps]).frames))
            rows.append((expected, int(steps[-1].logits.argmax()), int(label[0]), macs))
    before, after, truth, macs = (np.array(column) for column in zip(*rows, strict=True))
    return Comparison(name, before, after, truth, float(macs.mean()) / 1e9)


if __name__ == "__main__":
    sys.exit(main())
