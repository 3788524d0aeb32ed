"""Plain modules as people bring them: labels that come later, inputs of a whole video, advice in their own words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_models import CLIP, FLOW, SIZE
from torch import nn

from dvexport.errors import UsageError
from dvexport.models.base import imagenet_preprocess
from dvexport.models.described import Description, described
from dvexport.ports import Output
from dvexport.run.feeds import with_arrays
from dvexport.video.clips import Clip, read_clip, write_clip

PREPROCESS = imagenet_preprocess(SIZE, CLIP)


class Plain(nn.Module):
    def __init__(self, named: bool = False) -> None:
        super().__init__()
        self.named = named

    def forward(self, image):
        row = image.mean((2, 3))
        return {"output": row} if self.named else row


def plain(named=False):
    return described(Plain(named), "m", Description({"image": (3, *SIZE)}, PREPROCESS))


def test_labels_make_a_row_of_numbers_logits():
    net = plain()
    assert net.declared_outputs == (Output("output"),)
    net.set_labels(["a", "b", "c"])
    assert net.declared_outputs == (Output("logits", "logits", ("a", "b", "c")),)
    assert net.labels == ["a", "b", "c"]


def test_a_name_of_the_module_s_own_stays():
    with pytest.raises(UsageError, match="labels name the classes") as caught:
        plain(named=True).set_labels(["a", "b", "c"])
    assert "--kind output=logits" in caught.value.hint


def test_what_is_missing_is_asked_for_by_the_module_s_own_name():
    with pytest.raises(UsageError, match="nothing tells what a Plain takes") as caught:
        described(Plain(), "m")
    assert "--input image=3xHxW" in caught.value.hint
    assert "{'image': torch.zeros" in caught.value.hint


def test_rows_of_every_frame_are_sampled_as_the_video_is(tmp_path):
    write_clip(tmp_path / "v.mp4", np.zeros((20, 64, 64, 3), np.uint8), 10)
    clip = read_clip(tmp_path / "v.mp4", PREPROCESS)
    assert clip.length == 20
    assert len(clip.positions) == CLIP
    flow = np.arange(20, dtype=np.float32)[:, None, None, None] * np.ones(FLOW, np.float32)
    feeds = with_arrays(clip, ["frames", "flow"], {"flow": flow}, "v.mp4")
    assert feeds["flow"][:, 0, 0, 0].tolist() == list(clip.positions)
    assert with_arrays(clip, ["frames", "flow"], {"flow": flow[:CLIP]}, "v.mp4")["flow"] is not None
    with pytest.raises(UsageError, match=rf"must have {CLIP} frames, as the clip has, or 20, a row for every frame"):
        with_arrays(clip, ["frames", "flow"], {"flow": flow[:9]}, "v.mp4")


def test_frames_that_were_not_sampled_take_a_row_each():
    frames = torch.zeros(4, 3, *SIZE).numpy()
    alone = Clip(frames, frames, [0.0] * 4)
    with pytest.raises(UsageError, match="must have 4 frames, as the clip has") as caught:
        with_arrays(alone, ["frames", "flow"], {"flow": np.zeros((9, *FLOW), np.float32)}, "v.mp4")
    assert "every frame" not in str(caught.value)
