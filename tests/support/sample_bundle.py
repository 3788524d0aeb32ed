"""A small bundle's manifest and files, for the tests of whatever reads bundles."""

import numpy as np
from safetensors.numpy import save

from dvexport.bundle.archive import GOLDEN
from dvexport.bundle.manifest import GateEntry, InputEntry, Manifest, ModelEntry, OutputEntry, StateEntry
from dvexport.video.preprocess import Preprocess


def make_manifest(**changes):
    """Return a valid manifest with some fields replaced."""
    values = {
        "model": ModelEntry(name="dstep_resnet18", settings={"classes": 3, "hidden": 512}),
        "target": "raspberry-pi-5",
        "backend": "onnx",
        "mode": "stream",
        "inputs": [
            InputEntry(
                name="frames",
                shape=(1, 3, 64, 64),
                dtype="float32",
                preprocess=Preprocess(size=(64, 64), resize=64, frame_rate=12.5),
            )
        ],
        "outputs": [OutputEntry(name="logits", shape=(1, 3), dtype="float32")],
        "labels": ["left", "right", "up"],
        "states": [StateEntry(name="h", input="h_in", output="h_out", shape=(1, 8), dtype="float32")],
        "gates": [
            GateEntry(
                name="layer1.0",
                kind="channels+tiles",
                channels=64,
                grid=(7, 7),
                lowering="tiles",
                reason="cheaper",
            )
        ],
        "flops": {"fixed_macs": 12, "gates": [{"gate": "layer1.0", "macs_per_channel_per_tile": 3}]},
        "tools": {"dvexport": "0.1.0"},
    }
    return Manifest(**{**values, **changes})


FILES = {
    "model.onnx": bytes(range(256)) * 4,
    "extra/plan.json": b"{}",
    GOLDEN: save({"frames": np.arange(6, dtype=np.float32).reshape(2, 3)}),
}
