"""Every recipe that ships has its weights, made by it, and they do what the documents say."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dvexport.models import zoo
from dvexport.models.checkpoints.checkpoint import read_metadata
from dvexport.models.training.evaluate import evaluate
from dvexport.models.training.motion import CLASSES, MotionDataset
from dvexport.models.training.recipe import Recipe, load_recipe, recipe_names

SHIPPED = sorted(path.stem for path in zoo.weights_folder().glob("*.safetensors"))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_ships_its_weights_or_leads_to_those_that_do(name):
    shipped = {path.stem for path in zoo.weights_folder().glob("*.safetensors")}
    starts = {load_recipe(other).start_from for other in shipped}
    assert (name in shipped) != (name in starts)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_what_their_recipe_makes(name):
    recipe = load_recipe(name)
    about = read_metadata(zoo.weights_folder() / f"{name}.safetensors")
    assert isinstance(recipe, Recipe)
    assert about["recipe"] == json.loads(json.dumps(recipe.to_dict()))
    assert about["labels"] == list(CLASSES)
    tensors = load_file(zoo.weights_folder() / f"{name}.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("dstep_motion_d60", 0.95, 1), ("dstep_motion_d40", 0.95, 1), ("tsm_motion", 0.95, 1),
     ("tsn_motion", 0, 0.25), ("vit_motion", 0.7, 1)],
)  # fmt: skip
def test_shipped_weights_do_as_they_say(name, least, most):
    model = zoo.create(name)
    found = evaluate(
        model,
        MotionDataset("validation", model.preprocess.size[0], model.preprocess.frames),
        indices=range(24),
        batch=12,
    )
    assert least <= found.accuracy <= most
    recipe = load_recipe(name)
    if recipe.gates is None:
        assert found.executed_gmacs == found.dense_gmacs
        return
    executed = sum(s.executed for s in found.gates.values()) / len(found.gates)
    assert executed == pytest.approx(recipe.gates.target, abs=0.06)
    for gate, shares in found.gates.items():
        # Every gate is alive: it takes all three actions, and masks some tiles but not all.
        assert min(shares.skip, shares.reuse, shares.compute) > 0.03, gate
        assert 0.1 < shares.tiles < 0.95, gate
