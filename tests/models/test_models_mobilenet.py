"""MobileNetV2 with shifts, online and over a whole clip, against its equations."""

import pytest
import torch
from models_reference import mobilenet_offline, mobilenet_online_step, randomize_norms

from dvexport import gates
from dvexport.models import zoo


def small(name):
    torch.manual_seed(0)
    model = zoo.create(name, width=0.5, size=64, classes=7)
    randomize_norms(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            torch.nn.init.normal_(module.weight, 0, 0.5)  # the official start lets the signal fade
    return model


FRAMES = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_online_frame_by_frame_equals_the_whole_clip():
    model = small("tsm_online_mobilenetv2")
    logits, buffers = [], []
    with torch.no_grad():
        for frame in FRAMES:
            result, buffers = mobilenet_online_step(model.state_dict(), frame[None], buffers)
            logits.append(result)
        whole = model.per_frame_logits(FRAMES)
    assert len(buffers) == 10
    torch.testing.assert_close(whole, torch.cat(logits), rtol=1e-4, atol=1e-5)


def test_state_of_the_official_demo():
    model = zoo.create("tsm_online_mobilenetv2")
    shifts = [m for m in model.features if not isinstance(getattr(m, "shift", None), (torch.nn.Identity, type(None)))]
    widths = [m.conv[0].in_channels // 8 for m in shifts]
    assert widths == [3, 4, 4, 8, 8, 8, 12, 12, 20, 20]


@pytest.mark.parametrize("name", ["tsm_mobilenetv2", "tsm_online_mobilenetv2"])
def test_batch_of_clips_and_causality(name):
    model = small(name)
    with torch.no_grad():
        whole = model(FRAMES)
        with gates.frames_per_clip(5):
            batch = model(torch.cat([FRAMES, FRAMES.flip(0)]))
        prefix = model(FRAMES[:3])
    torch.testing.assert_close(batch[:5], whole, rtol=1e-4, atol=1e-5)
    assert torch.allclose(prefix, whole[:3], rtol=1e-4, atol=1e-5) == model.causal


def test_offline_equals_the_equations():
    model = small("tsm_mobilenetv2")
    with torch.no_grad():
        expected = mobilenet_offline(model.state_dict(), FRAMES)
        torch.testing.assert_close(model.per_frame_logits(FRAMES), expected, rtol=1e-4, atol=1e-5)
