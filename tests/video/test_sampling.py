"""Positions of frames as the official test code computes them, and the views they make."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvexport.errors import ClipError, UsageError
from dvexport.video.clips import read_clip, read_views, stream_frames, write_clip
from dvexport.video.limits import MAX_ASPECT, MAX_FRAMES, MAX_VIEWS
from dvexport.video.preprocess import Preprocess
from dvexport.video.sampling import dense_positions, sample_positions, time_positions


def official_video_swin(total, frames, interval, clips):
    """MMAction2's SampleFrames in test mode, with out_of_bound_opt='loop'."""
    span = frames * interval
    average = (total - span + 1) / float(clips)
    offsets = np.zeros(clips, int)
    if total > span - 1:
        offsets = (np.arange(clips) * average + average / 2.0).astype(int)
    return np.mod(offsets[:, None] + np.arange(frames)[None] * interval, total).tolist()


def official_videomae(total, frames, interval, clips):
    """VideoMAE's VideoClsDataset in test mode."""
    kept = list(range(0, total, interval))
    while len(kept) < frames:
        kept.append(kept[-1])
    step = max(1.0 * (len(kept) - frames) / (clips - 1), 0)
    return [kept[int(chunk * step) : int(chunk * step) + frames] for chunk in range(clips)]


@given(st.integers(1, 900), st.sampled_from([(16, 4), (32, 2), (4, 1)]), st.sampled_from([2, 3, 5]))
def test_dense_positions_are_the_official_ones(total, recipe, clips):
    frames, stride = recipe
    # The official floats are exact within one rounding; where they fall below a whole number the exact one is right.
    for ends, official in ((False, official_video_swin), (True, official_videomae)):
        ours = np.array(dense_positions(total, frames, stride, clips, to_ends=ends))
        assert ours.shape == (clips, frames)
        assert ours.min() >= 0
        assert ours.max() < total
        theirs = np.array(official(total, frames, stride, clips))
        assert np.isin((ours - theirs) % total, [0, 1, stride]).all()
        assert np.mean(ours[0] == theirs[0]) == 1 or not ends


def test_dense_positions_by_hand():
    assert dense_positions(300, 32, 2, 4, to_ends=False) == official_video_swin(300, 32, 2, 4)
    assert dense_positions(300, 16, 4, 5, to_ends=True) == official_videomae(300, 16, 4, 5)
    assert dense_positions(10, 4, 2, 2, to_ends=False) == [[0, 2, 4, 6], [2, 4, 6, 8]]
    assert dense_positions(3, 4, 2, 1, to_ends=False) == [[0, 2, 1, 0]]
    assert dense_positions(20, 4, 2, 3, to_ends=True) == [[0, 2, 4, 6], [6, 8, 10, 12], [12, 14, 16, 18]]
    assert dense_positions(3, 4, 2, 2, to_ends=True) == [[0, 2, 2, 2]] * 2


@pytest.mark.parametrize("rate", [24, 25, 30, 60, 120])
def test_times_rounded_to_milliseconds_are_a_constant_rate(rate):
    times = [Fraction(round(1000 * i / rate), 1000) for i in range(rate * 3)]
    assert time_positions(times, 8) == sample_positions(len(times), 8)


def test_times_of_one_frame_and_of_none_that_passes():
    assert time_positions([Fraction(0)], 1) == [0]
    assert time_positions([Fraction(0)] * 4, 4) == [0, 1, 2, 3]


@pytest.fixture
def video(tmp_path):
    images = np.zeros((20, 32, 96, 3), np.uint8)
    images += np.arange(20, dtype=np.uint8)[:, None, None, None] * 5
    images[:, :, 32:64] += 60
    images[:, :, 64:] += 120
    write_clip(tmp_path / "v.mp4", images, 10)
    return tmp_path / "v.mp4"


def test_views_are_clips_times_crops(video):
    recipe = Preprocess(size=(32, 32), resize=32, frames=4, sampling="dense", stride=2, clips=2, crops=3)
    views = read_views(video, recipe)
    assert len(views) == 6
    means = [[round(float(image[4:-4, 4:-4].mean()) / 5) for image in view.images] for view in views]
    # Room for 13 starts: the clips begin at 13/4 and 3 * 13/4, rounded down.
    first, second = np.array([3, 5, 7, 9]), np.array([9, 11, 13, 15])
    np.testing.assert_allclose(means, [c + 12 * k for c in (first, second) for k in range(3)], atol=1)
    middle = read_clip(video, recipe)
    np.testing.assert_array_equal(middle.frames, views[4].frames)


def test_one_view_is_the_clip(video):
    plain = Preprocess(size=(32, 32), resize=32, frames=4)
    (view,) = read_views(video, plain)
    np.testing.assert_array_equal(view.frames, read_clip(video, plain).frames)


def test_a_short_video_is_enough_for_a_dense_clip_only(video):
    wide = {"size": (32, 32), "resize": 32, "frames": 32}
    with pytest.raises(ClipError, match="has 20 frames"):
        read_clip(video, Preprocess(**wide))
    assert len(read_clip(video, Preprocess(**wide, sampling="dense", stride=2)).frames) == 32


def test_manifests_of_before_are_read_and_written_as_they_were():
    old = {
        "size": [224, 224], "resize": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        "colour_order": "RGB", "frames": 8, "sampling": "uniform", "frame_rate": None,
    }  # fmt: skip
    assert Preprocess.from_dict(old).to_dict() == old
    recipe = Preprocess(frames=16, sampling="dense_to_ends", stride=4, clips=5, crops=3)
    assert Preprocess.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("value", [1e9, 1e30, float("inf"), float("-inf"), float("nan"), -1, 0, True, "1", None, [1]])
@pytest.mark.parametrize("key", ["resize", "frames", "stride", "clips", "crops", "frame_rate", "size", "mean", "std"])
def test_every_number_of_a_preprocessing_has_a_range(key, value):
    usable = (key == "frame_rate" and value is None) or (key == "mean" and value in (0, -1) and value is not True)
    given_value = value if key in ("resize", "frames", "stride", "clips", "crops", "frame_rate") else [value] * 3
    if key == "size":
        given_value = [value] * 2
    if usable:
        assert Preprocess.from_dict({"sampling": "dense", key: given_value}).frames == 8
        return
    with pytest.raises(UsageError, match="preprocessing is not usable"):
        Preprocess.from_dict({"sampling": "dense", key: given_value})


@pytest.mark.parametrize(
    "change",
    [
        {"frames": MAX_FRAMES + 1},
        {"frames": 99999999999999999999},
        {"clips": MAX_VIEWS + 1, "sampling": "dense"},
        {"clips": MAX_VIEWS // 2, "crops": 3, "sampling": "dense"},
        {"size": (4096, 4096), "resize": 4096, "frames": 32},
        {"stride": 2},
        {"clips": 2},
        {"crops": 2},
    ],
)
def test_numbers_that_do_not_fit_together(change):
    with pytest.raises(UsageError, match="preprocessing is not usable"):
        Preprocess(**change)


@pytest.mark.parametrize("rate", [0, -1, 1e30, float("nan"), float("inf"), 1e-9])
def test_frame_rates_out_of_range(rate, video):
    with pytest.raises(UsageError, match="frame rate"):
        next(stream_frames(video, Preprocess(), rate))


def test_the_widest_frame_that_is_taken(tmp_path):
    write_clip(tmp_path / "v.mp4", np.zeros((1, 32, 32 * MAX_ASPECT, 3), np.uint8), 10)
    assert read_clip(tmp_path / "v.mp4", Preprocess(size=(32, 32), resize=32, frames=1)).frames.shape[0] == 1
