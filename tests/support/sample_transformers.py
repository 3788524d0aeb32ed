"""Small video transformers with random weights, and directories of Hugging Face's library, whole and damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dvexport.models import zoo

VIDEOMAE = {
    "image_size": 32, "num_frames": 4, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 60, "id2label": {0: "wave", 1: "nod", 2: "hold"},
}  # fmt: skip
BIAS = "videomae.encoder.layer.1.output.dense.bias"

SWIN = {"embed_dim": 8, "depths": "1,2,2,1", "heads": "1,2,2,4", "classes": 5, "frames": 8, "size": 64}
WINDOWED = {"window": "2,7,7"}


def save_videomae(folder, *, shards=None, mean=None, **options):
    """Save a tiny random model as the library does; return it."""
    transformers = pytest.importorskip("transformers", reason="needs the library that writes these directories")
    torch.manual_seed(0)
    model = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**{**VIDEOMAE, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    side = model.config.image_size
    about = {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
    if mean is not None:
        about |= {"image_mean": mean, "image_std": [0.5, 0.25, 0.125], "size": {"shortest_edge": 40}}
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, **about}))
    return model


def edit_config(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    keys = load_file(folder / "model.safetensors")
    change(keys)
    save_file(keys, folder / "model.safetensors")


def small_swin(**options):
    torch.manual_seed(1)
    model = zoo.create("video_swin_tiny", **{**SWIN, **WINDOWED, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def keys_of_width(width, depth=12):
    """Keys of a file of a published width, with blocks of one value to be quick."""
    with torch.device("meta"):
        model = zoo.create("vit_small", embed_dim=width, depth=depth, heads=1)
    return {key: torch.zeros(value.shape) for key, value in model.state_dict().items()}
