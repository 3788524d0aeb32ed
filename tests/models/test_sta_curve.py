"""The curve over r: its points against what the model itself says, and the picture."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from benchmarks.sta_curve import COLUMNS, Point, curve, draw, measure
from benchmarks.timing import Timing
from dvexport.models import zoo
from dvexport.models.training.evaluate import evaluate
from dvexport.models.training.motion import SPLITS, MotionDataset
from dvexport.models.training.train import train

RECIPE = """
name = "tiny"
model = "vit_small"
settings = { depth = 3, embed_dim = 8, heads = 2, patch = 8, sta_groups = [2, 1, 1] }
[data]
size = 32
frames = 4
clips_per_epoch = 16
validation_clips = 12
[optimiser]
epochs = 1
batch = 16
"""


def point(method, r, ms, accuracy):
    time = Timing(np.array([ms]))
    return Point(method, r, 10, 0.1, accuracy, 0, time, 1.0)


@pytest.mark.slow
def test_points_are_those_of_the_models(tmp_path, monkeypatch):
    monkeypatch.setitem(SPLITS, "validation", 24)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    weights = str(train(recipe, output=tmp_path, device="cpu", progress=lambda line: None).weights)
    points = measure("vit_small", [2], checkpoint=weights, clips=12, rounds=2, seeds=2)
    assert [(p.method, p.r, p.tokens) for p in points] == [("sta", 0, 32), ("sta", 2, 24), ("random", 2, 24)]
    assert [p.changed for p in points] == [0, 0, 0]
    assert points[1].gmacs == pytest.approx(points[2].gmacs, rel=0.3)
    assert points[1].gmacs < points[0].gmacs
    data = MotionDataset("validation", 32, 4)
    pruned = [{"sta_method": "sta"}, {"sta_method": "random"}, {"sta_method": "random", "sta_seed": 1}]
    found = [evaluate(zoo.create("vit_small", weights, sta_r=2, **one), data, indices=range(12)) for one in pruned]
    assert points[1].accuracy == found[0].accuracy
    assert points[2].accuracy == pytest.approx((found[1].accuracy + found[2].accuracy) / 2)
    assert points[0].speedup == 1
    assert set(points[0].row()) == set(COLUMNS)


def test_the_picture_has_a_line_a_method_from_the_same_beginning():
    points = [point("sta", 0, 8.0, 0.9), point("sta", 4, 6.0, 0.85), point("random", 4, 5.0, 0.6)]
    assert curve(points, "random") == [(8.0, 0.9, 0), (5.0, 0.6, 4)]
    picture = ElementTree.fromstring(draw(points))
    lines = [e for e in picture.iter() if e.tag.endswith("polyline")]
    starts = [line.attrib["points"].split() for line in lines]
    assert [len(line) for line in starts] == [2, 2]
    assert starts[0][0] == starts[1][0]
    # Less accurate is lower in the picture, faster is further left.
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in starts[1])
    assert x1 < x0
    assert y1 > y0
