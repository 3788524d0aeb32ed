"""Published parameters and FLOPs against what the models of the zoo have, counted without their weights."""

from __future__ import annotations

import dataclasses

import pytest
from fvcore_flops import operator_flops

from dvexport.models import token_figures, zoo
from dvexport.models.figures import figures, footprint, table
from dvexport.models.token_figures import PUBLISHED, operators, vit_flops
from dvexport.trace import trace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    """The figures by name. No whole transformer is traced for them, which would take minutes."""
    depths, whole = [], token_figures.operators

    def traced(family, options):
        depths.append(options["depth"] if family == "vit" else sum(options["depths"]))
        return whole(family, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_figures, "operators", traced)
        values = figures()
    assert len(depths) == 32
    assert max(depths) == 8 < zoo.create("vit_small").config.depth
    return {figure.name: figure for figure in values}


EXPECTED = {
    "TSN R18 parameters": 11.266,
    "TSN R50 parameters": 23.865,
    "AdaFuse R18 parameters": 15.576,
    "AdaFuse R50 parameters": 37.687,
    "AdaFuse R50-Last parameters": 39.083,
    "D-STEP R18 parameters": 15.589,
    "D-STEP R50 parameters": 37.805,
    "D-STEP R18, README command, parameters": 20.222,
    "TSN R18": 14.51,
    "TSN R50": 32.70,
    "MobileNetV2, one frame, 1000 classes": 0.301,
    "D-STEP R18 policies": 0.0713,
    "D-STEP R50 policies": 0.308,
    "D-STEP R18 masks": 0.00519,
    "D-STEP R50 masks": 0.0463,
    "AdaFuse R18, every channel skipped": 1.21,
    "AdaFuse R50, every channel skipped": 11.08,
    **{f"{label}, r = {r}": float(reference) for label, row in PUBLISHED.values() for r, (reference, _) in row.items()},
}


def test_every_figure_is_there(found):
    assert list(found) == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_figure(found, name):
    assert found[name].value == pytest.approx(EXPECTED[name], rel=2e-3)
    assert found[name].ok


def test_every_difference_is_explained(found):
    for figure in found.values():
        same = f"{figure.value:.{len(figure.published.partition('.')[2])}f}" == figure.published
        assert same or figure.note


def test_a_figure_that_is_off_is_called_so(found):
    figure = found["AdaFuse R50 parameters"]
    assert not dataclasses.replace(figure, value=figure.value * 1.001).ok
    assert not dataclasses.replace(figure, counted=figure.counted * 1.01).ok
    tolerant = found["TSN R50"]
    assert not dataclasses.replace(tolerant, counted=tolerant.counted * 0.97).ok
    assert dataclasses.replace(figure, value=1.0).row()[4] == "OFF"


def test_shared_layers_count_once_as_parameters_and_every_time_as_work():
    shared, apart = (footprint("adafuse_resnet18", shared_policies=s) for s in (True, False))
    assert shared.total == apart.total
    assert apart.parameters - shared.parameters == pytest.approx(15_740_000 - 15_576_000, abs=1000)


def test_mask_grows_with_the_input():
    small, large = (footprint("dstep_resnet18", size=s) for s in ((112, 112), (224, 224)))
    assert large.part(".mask.") > small.part(".mask.")
    assert large.part(".policy.") == small.part(".policy.")


def test_table_has_a_header_and_a_row_each(found):
    rows = table(list(found.values()))
    assert len(rows) == len(found) + 1
    assert {len(row) for row in rows} == {6}


def test_transformers_are_within_a_percent_of_every_published_cell(found):
    cells = [found[f"{label}, r = {r}"] for label, row in PUBLISHED.values() for r in row]
    assert len(cells) == 32
    assert all(abs(cell.value / float(cell.published) - 1) < 0.01 for cell in cells)


@pytest.mark.parametrize("r", [0, 6])
def test_a_block_of_each_kind_stands_for_the_whole_graph(r):
    model = zoo.create("vit_small", depth=7, embed_dim=24, heads=3, size=(64, 64), **{"sta.r": r})
    counted = vit_flops(model.config)
    assert counted == sum(operators("vit", vars(model.config)).values())
    exported = trace(model, model.config.size)
    assert counted == pytest.approx(operator_flops(exported), rel=2e-3)
