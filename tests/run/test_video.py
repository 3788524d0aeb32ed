"""Videos: which frames of a file a clip holds, and what becomes of them on the way to the model."""

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvexport.errors import ClipError, UsageError
from dvexport.video.clips import read_clip, sample_positions, stream_frames, write_clip
from dvexport.video.preprocess import Preprocess

SMALL = Preprocess(size=(32, 32), resize=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), frames=4)


def grey_levels(count, height=32, width=48):
    """Frame n is the grey level 10 n, so a frame tells its index after any scaling."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None] * 10, (count, height, width, 3))


def index_of(images):
    return [round(float(image.mean()) / 10) for image in images]


@pytest.fixture
def video(tmp_path):
    write_clip(tmp_path / "a.mp4", grey_levels(20), 24)
    return tmp_path / "a.mp4"


def test_written_bytes_repeat(video, tmp_path):
    write_clip(tmp_path / "b.mp4", grey_levels(20), 24)
    assert (tmp_path / "b.mp4").read_bytes() == video.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_a_clip_holds_the_centre_of_each_segment(video):
    clip = read_clip(video, SMALL)
    assert clip.frames.shape == (4, 3, 32, 32)
    assert clip.frames.dtype == np.float32
    assert clip.images.shape == (4, 32, 32, 3)
    assert index_of(clip.images) == [2, 7, 12, 17]
    np.testing.assert_allclose(clip.times, np.array([2, 7, 12, 17]) / 24)


@given(total=st.integers(1, 500), frames=st.integers(1, 64))
def test_positions_are_in_range_and_as_tsn_has_them(total, frames):
    positions = sample_positions(total, frames)
    tick = Fraction(total, frames)
    assert positions == [int(tick / 2 + tick * i) for i in range(frames)]
    assert 0 <= positions[0] <= positions[-1] < total


def test_normalisation_and_colour_order(tmp_path):
    colour = np.array([200, 100, 50], np.uint8)
    write_clip(tmp_path / "c.mp4", np.broadcast_to(colour, (4, 32, 32, 3)), 10)
    rgb = read_clip(tmp_path / "c.mp4", SMALL)
    seen = rgb.images[0, 16, 16].astype(np.float32)
    np.testing.assert_allclose(seen, colour, atol=4)
    np.testing.assert_allclose(rgb.frames[0, :, 16, 16], (seen / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5], rtol=1e-5)
    bgr = read_clip(tmp_path / "c.mp4", Preprocess.from_dict({**SMALL.to_dict(), "colour_order": "BGR"}))
    np.testing.assert_array_equal(bgr.images, rgb.images)
    np.testing.assert_allclose(
        bgr.frames[0, :, 16, 16], (seen[::-1] / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5], rtol=1e-5
    )


def test_the_short_side_is_scaled_and_the_centre_cut_out(tmp_path):
    frames = np.zeros((4, 64, 128, 3), np.uint8)
    frames[:, :, 32:96] = 200
    write_clip(tmp_path / "c.mp4", frames, 10)
    image = read_clip(tmp_path / "c.mp4", SMALL).images[0].astype(int)
    assert image[16, 2:30].min() > 190
    wide = read_clip(tmp_path / "c.mp4", Preprocess(size=(32, 64), resize=32, frames=4)).images[0].astype(int)
    assert wide[16, :14].max() < 10
    assert wide[16, 18:46].min() > 190
    assert wide[16, 50:].max() < 10


@pytest.mark.parametrize("size", [(224, 224), (40, 90), (90, 40), (33, 57)])
def test_every_crop_is_filled(video, size):
    clip = read_clip(video, Preprocess(size=size, resize=min(size), frames=2))
    assert clip.images.shape == (2, *size, 3)
    assert index_of(clip.images) == [5, 15]


def test_scaling_agrees_with_pillow(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    frame = np.kron(coarse, np.ones((10, 10, 1), np.uint8))
    write_clip(tmp_path / "c.mp4", frame[None], 10)
    native = read_clip(tmp_path / "c.mp4", Preprocess(size=(120, 160), resize=120, frames=1)).images[0]
    ours = read_clip(tmp_path / "c.mp4", Preprocess(size=(48, 64), resize=48, frames=1)).images[0]
    theirs = np.asarray(image_module.fromarray(native).resize((64, 48), image_module.Resampling.BILINEAR))
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_a_phone_video_is_turned_upright(tmp_path, video, monkeypatch):
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :, :32] = 200
    write_clip(tmp_path / "c.mp4", frames, 10)
    half = Preprocess(size=(64, 32), resize=32, frames=1)
    turned = av.VideoFrame.from_ndarray(frames[0], "rgb24")

    class Turned:
        rotation = 90
        width, height = turned.width, turned.height
        reformat = turned.reformat

    from dvexport.video import clips as video_module

    monkeypatch.setattr(video_module, "decode", lambda _path, **_: iter([_with_time(Turned())]))
    image = read_clip("any", half).images[0].astype(int)
    # A turn of 90 degrees to the left takes the left side to the bottom.
    assert image[40:].min() > 190
    assert image[:24].max() < 10


def _with_time(frame):
    frame.pts, frame.time_base = 0, Fraction(1, 10)
    return frame


def test_a_stream_has_all_frames_or_those_of_its_rate(video):
    assert index_of(f.image for f in stream_frames(video, SMALL)) == list(range(20))
    assert index_of(f.image for f in stream_frames(video, SMALL, 12)) == list(range(0, 20, 2))
    assert index_of(f.image for f in stream_frames(video, SMALL, 60)) == list(range(20))
    assert index_of(f.image for f in stream_frames(video, SMALL, limit=3)) == [0, 1, 2]
    slow = Preprocess.from_dict({**SMALL.to_dict(), "frame_rate": 6.0})
    assert index_of(f.image for f in stream_frames(video, slow)) == list(range(0, 20, 4))


def test_rates_that_containers_round(tmp_path):
    write_clip(tmp_path / "ntsc.mp4", grey_levels(20), 30000 / 1001)
    kept = index_of(f.image for f in stream_frames(tmp_path / "ntsc.mp4", SMALL, 30000 / 2002))
    assert kept == list(range(0, 20, 2))


def test_a_stream_gives_what_a_clip_gives(video):
    clip = read_clip(video, SMALL)
    frames = list(stream_frames(video, SMALL))
    np.testing.assert_array_equal(clip.frames, np.stack([frames[i].tensor for i in (2, 7, 12, 17)]))


def test_too_few_frames(tmp_path):
    write_clip(tmp_path / "short.mp4", grey_levels(3), 10)
    with pytest.raises(ClipError, match="has 3 frames, the model needs 4"):
        read_clip(tmp_path / "short.mp4", SMALL)


def test_videos_that_cannot_be_read(video, tmp_path):
    (tmp_path / "text.mp4").write_text("this is no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:200])
    for name in ("text.mp4", "empty.mp4", "cut.mp4"):
        with pytest.raises(ClipError, match="can't be read"):
            read_clip(tmp_path / name, SMALL)
    with pytest.raises(ClipError, match="no numbered images"):
        read_clip(tmp_path, SMALL)
    for name in ("missing.mp4", "nul\0.mp4", "x" * 300):
        with pytest.raises(ClipError, match="no such video"):
            next(stream_frames(tmp_path / name, SMALL))
    with pytest.raises(ClipError, match="no such video"):
        read_clip("http://localhost/a.mp4", SMALL)


def test_a_file_with_sound_only(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ClipError, match="no video stream"):
        read_clip(path, SMALL)


def test_a_video_without_frames(tmp_path):
    path = tmp_path / "none.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    with pytest.raises(ClipError, match=r"no frames|can't be read"):
        read_clip(path, SMALL)


def test_frames_that_no_video_can_hold(tmp_path):
    with pytest.raises(UsageError, match="even sizes"):
        write_clip(tmp_path / "a.mp4", np.zeros((1, 33, 32, 3), np.uint8), 10)
    with pytest.raises(UsageError, match="uint8"):
        write_clip(tmp_path / "a.mp4", np.zeros((1, 32, 32, 3), np.float32), 10)
    with pytest.raises(UsageError, match="does not exist"):
        write_clip(tmp_path / "no" / "a.mp4", np.zeros((1, 32, 32, 3), np.uint8), 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"size": (32,)}, "size"),
        ({"size": (64, 64)}, "resize"),
        ({"std": (0.0, 1.0, 1.0)}, "std"),
        ({"colour_order": "GBR"}, "colour_order"),
        ({"frames": 0}, "frames"),
        ({"sampling": "random"}, "sampling"),
        ({"frame_rate": -1.0}, "frame_rate"),
        ({"mean": "abc"}, "mean"),
        ({"frames": "8"}, "frames"),
        ({"tint": 1}, "tint"),
    ],
)
def test_preprocessing_names_its_bad_key(change, key):
    with pytest.raises(UsageError, match=f"where: {key}"):
        Preprocess.from_dict({**SMALL.to_dict(), **change})


def test_preprocessing_round_trip():
    assert Preprocess.from_dict(SMALL.to_dict()) == SMALL
