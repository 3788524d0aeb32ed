"""Files as people and attackers have them: cut off, of other kinds, lists of other files, too large, folders."""

import logging
import os
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest

from dvexport.errors import ClipError
from dvexport.video.clips import read_clip, stream_frames, write_clip
from dvexport.video.preprocess import Preprocess

SMALL = Preprocess(size=(32, 32), resize=32, frames=4)
NOISE = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)


def make(path, kind, codec, pixels="yuv420p", count=60, images=NOISE, times=None, **options):
    with av.open(str(path), "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = images.shape[1], images.shape[2], pixels
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(images[index]), "rgb24").reformat(format=pixels)
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(path, **change):
    clip = read_clip(path, Preprocess(size=(32, 32), resize=32, frames=change.pop("frames", 4), **change))
    return [round(float(image.mean()) / 10) for image in clip.images]


def grey(count, height=32, width=48):
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None] * 10, (count, height, width, 3))


def png(path, image):
    path.write_bytes(encoded(image, "png", "rgb24"))


def encoded(image, codec, pixels):
    context = av.CodecContext.create(codec, "w")
    context.height, context.width, context.pix_fmt = image.shape[0], image.shape[1], pixels
    context.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24").reformat(format=pixels)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode()])


WHOLE = [
    ("mp4", "libx264", "yuv420p", {}),
    ("mp4", "libx264", "yuv420p", {"movflags": "faststart"}),
    ("mp4", "libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov", "frag_duration": "1000000"}),
    ("matroska", "libx264", "yuv420p10le", {}),
    ("webm", "libvpx", "yuv420p", {}),
    ("mpegts", "libx264", "yuv420p", {}),
    ("avi", "mpeg4", "yuv420p", {}),
    ("flv", "libx264", "yuv420p", {}),
    ("gif", "gif", "rgb8", {}),
    ("apng", "apng", "rgba", {}),
    ("apng", "apng", "gray", {}),
    ("mjpeg", "mjpeg", "yuvj420p", {}),
    ("h264", "libx264", "yuv420p", {}),
]
CUT = [WHOLE[1], WHOLE[2], WHOLE[3], WHOLE[4], WHOLE[5], WHOLE[6], WHOLE[7], WHOLE[8], WHOLE[9], WHOLE[11]]


@pytest.mark.parametrize(("kind", "codec", "pixels", "options"), WHOLE)
def test_whole_files_give_all_frames_and_no_warning(kind, codec, pixels, options, tmp_path, caplog):
    make(tmp_path / "v", kind, codec, pixels, **options)
    assert sum(1 for _ in stream_frames(tmp_path / "v", SMALL)) == 60
    assert caplog.messages == []


@pytest.mark.parametrize(("kind", "codec", "pixels", "options"), CUT)
def test_what_is_cut_off_gives_its_frames_and_one_warning(kind, codec, pixels, options, tmp_path, caplog):
    path = make(tmp_path / "v", kind, codec, pixels, **options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    clip = read_clip(path, SMALL)
    assert len(clip.frames) == 4
    assert clip.times[-1] < 4
    (message,) = caplog.messages
    assert message.startswith("warning: the video is cut off or damaged")
    assert str(path) in message
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_sound_may_be_longer_than_the_pictures(name, tmp_path, caplog):
    with av.open(str(tmp_path / name), "w") as container:
        pictures = container.add_stream("libx264", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=8000)
        for image in NOISE[:20]:
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(pictures.encode())
        for second in range(6):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 8000, second * 8000
            container.mux(sound.encode(samples))
        container.mux(sound.encode())
    assert sum(1 for _ in stream_frames(tmp_path / name, SMALL)) == 20
    assert caplog.messages == []


def test_an_mp4_without_its_index_holds_nothing_to_read(tmp_path):
    path = make(tmp_path / "v", "mp4", "libx264")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ClipError, match="can't be read"):
        read_clip(path, SMALL)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", b"hello\nworld\n" * 100, "can't be read"),
        ("a.ans", b"\x1b[31mred\x1b[0m\n" * 100, "can't be read"),
        ("a.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nv.ts\n#EXT-X-ENDLIST\n", "HLS playlist"),
        ("a.mp4", b"#EXTM3U\n#EXTINF:9,\nv.ts\n", "HLS playlist"),
        ("a.ffconcat", b"ffconcat version 1.0\nfile 'v.ts'\n", "list of files"),
        ("a.mpd", b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>", "XML"),
        ("a.sdp", b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n", "read"),
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "can't be read"),
        ("a.srt", b"1\n00:00:01,000 --> 00:00:02,000\nhello\n", "can't be read"),
    ],
)
def test_texts_and_lists_are_no_videos(name, content, why, tmp_path):
    make(tmp_path / "v.ts", "mpegts", "libx264", count=10)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ClipError, match=why):
        read_clip(tmp_path / name, SMALL)


def test_a_name_is_a_name_and_no_pattern(tmp_path):
    for name in ("img_%03d.jpg", "a*?{1,2}.png", "concat:b|c", "pipe:0", "-", "a\nb\x1b[31m.mp4", "\udcff.mp4"):
        write_clip(tmp_path / "plain.mp4", grey(4), 10)
        os.rename(tmp_path / "plain.mp4", tmp_path / name)
        assert levels(tmp_path / name) == [0, 1, 2, 3]


def test_odd_names_are_shown_without_their_control_characters(tmp_path):
    (tmp_path / "a\x1b[31m\n.mp4").write_text("text")
    with pytest.raises(ClipError, match=r"a\\x1b\[31m\\n\.mp4"):
        read_clip(tmp_path / "a\x1b[31m\n.mp4", SMALL)


def test_devices_and_pipes_end_with_an_error(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/zero", "/dev/null", tmp_path / "fifo"):
        with pytest.raises(ClipError, match="no regular file"):
            read_clip(path, SMALL)


def header_only_png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes((3 * width + 1) * height)) if width * height < 10**6 else zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"),
    [(8000, 1), (1, 8000), (33, 1), (100000, 100000), (2**31 - 1, 2**31 - 1), (16384, 4097), (0, 0)],
)
def test_sizes_that_no_clip_has(width, height, tmp_path):
    (tmp_path / "a.png").write_bytes(header_only_png(width, height))
    with pytest.raises(ClipError, match=r"more than|can't be read"):
        read_clip(tmp_path / "a.png", Preprocess(frames=1))


def test_a_long_and_flat_video_is_refused_before_it_is_scaled(tmp_path):
    make(tmp_path / "v", "avi", "ffv1", images=np.zeros((4, 2, 4000, 3), np.uint8), count=4)
    with pytest.raises(ClipError, match="4000 x 2 is more than 32 to 1"):
        read_clip(tmp_path / "v", SMALL)


def test_a_size_that_scaling_makes_too_large(tmp_path):
    write_clip(tmp_path / "v", grey(1, 32, 512), 10)
    with pytest.raises(ClipError, match="become too large"):
        read_clip(tmp_path / "v", Preprocess(resize=4096, frames=1))


@pytest.mark.parametrize(("height", "width"), [(33, 57), (1, 1), (1, 31), (17, 16)])
def test_odd_sizes(height, width, tmp_path):
    png(tmp_path / "a.png", np.full((height, width, 3), 90, np.uint8))
    assert levels(tmp_path / "a.png", frames=1) == [9]


def test_a_folder_of_images_is_a_clip_in_the_order_of_its_numbers(tmp_path):
    for index, image in enumerate(grey(12)):
        png(tmp_path / f"img_{index + 1}.png", image)
    (tmp_path / "labels.txt").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    assert levels(tmp_path, frames=12) == list(range(12))
    assert read_clip(tmp_path, SMALL).times == pytest.approx([1 / 25, 4 / 25, 7 / 25, 10 / 25])


@pytest.mark.parametrize("name", ["img_%05d.jpg", "%04d.JPEG", "frame-%d.jpg", "video.mp4_%06d.jpg"])
def test_a_folder_of_jpegs(name, tmp_path):
    for index, image in enumerate(grey(4)):
        (tmp_path / (name % (index + 8))).write_bytes(encoded(image, "mjpeg", "yuvj420p"))
    assert levels(tmp_path) == [0, 1, 2, 3]


def test_folders_that_are_no_clip(tmp_path):
    with pytest.raises(ClipError, match="no numbered images"):
        read_clip(tmp_path, SMALL)
    for index in (1, 2, 4):
        png(tmp_path / f"a{index}.png", grey(1)[0])
    with pytest.raises(ClipError, match="no image has number 3"):
        read_clip(tmp_path, SMALL)
    png(tmp_path / "a3.png", grey(1, 64, 48)[0])
    with pytest.raises(ClipError, match="48 x 64 after 48 x 32"):
        read_clip(tmp_path, SMALL)
    png(tmp_path / "a3.png", grey(1)[0])
    png(tmp_path / "a03.png", grey(1)[0])
    with pytest.raises(ClipError, match="one number"):
        read_clip(tmp_path, SMALL)
    os.rename(tmp_path / "a03.png", tmp_path / "b03.png")
    with pytest.raises(ClipError, match=r"a\*\.png, b\*\.png"):
        read_clip(tmp_path, SMALL)
    os.remove(tmp_path / "b03.png")
    (tmp_path / "a3.png").write_bytes(b"no image")
    with pytest.raises(ClipError, match=r"(?s)can't be read.*a3\.png"):
        read_clip(tmp_path, SMALL)


@pytest.mark.parametrize(("suffix", "codec", "pixels"), [("png", "png", "rgb24"), ("jpg", "mjpeg", "yuvj420p")])
def test_an_image_that_is_cut_off_is_told(suffix, codec, pixels, tmp_path, caplog):
    for index in range(4):
        data = encoded(NOISE[index], codec, pixels)
        (tmp_path / f"a{index}.{suffix}").write_bytes(data[: len(data) // 2] if index == 2 else data)
    if suffix == "png":  # half of its zlib stream is no image for FFmpeg, and half of a JPEG is
        with pytest.raises(ClipError, match=r"a2\.png"):
            read_clip(tmp_path, SMALL)
        return
    assert len(read_clip(tmp_path, SMALL).frames) == 4
    (message,) = caplog.messages
    assert "a2.jpg" in message


def test_a_variable_frame_rate_is_sampled_by_time(tmp_path):
    # Ten frames in the first 100 ms, then one each second: by index nearly all would be of the start.
    times = [index * 10 for index in range(10)] + [1000 + index * 1000 for index in range(10)]
    make(tmp_path / "v", "matroska", "ffv1", "bgr0", count=20, images=grey(20), times=times)
    clip = read_clip(tmp_path / "v", SMALL)
    # The last frame is shown for the median distance, 0.91 s; middles of quarters are 1.4, 4.1, 6.8 and 9.5 s.
    assert clip.times == pytest.approx([1, 4, 6, 9])


def test_a_turned_phone_video(tmp_path):
    images = np.zeros((4, 32, 64, 3), np.uint8)
    images[:, :, :32] = 200
    path = make(tmp_path / "v.mp4", "mp4", "libx264", images=images, count=4)
    data = bytearray(path.read_bytes())
    unit = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    place = data.index(unit, data.index(b"tkhd"))
    data[place : place + 36] = turned
    path.write_bytes(data)
    image = read_clip(path, Preprocess(size=(64, 32), resize=32, frames=1)).images[0].astype(int)
    # Turned right by 90 degrees, the left side is on top.
    assert image[:24].min() > 190
    assert image[40:].max() < 10


def test_a_camera_that_is_not_there(tmp_path):
    with pytest.raises(ClipError, match=r"(?s)camera can't be opened.*camera:97"):
        next(stream_frames("camera:97", SMALL))
    with pytest.raises(ClipError, match="no length"):
        read_clip("camera:97", SMALL)


def test_a_camera_streams_until_its_limit(monkeypatch, tmp_path):
    write_clip(tmp_path / "v.mp4", grey(20), 10)
    opened = av.open
    asked = []

    def device(name, **options):
        asked.append((name, options))
        return opened(str(tmp_path / "v.mp4"))

    monkeypatch.setattr(av, "open", device)
    assert sum(1 for _ in stream_frames("camera:0", SMALL, limit=3)) == 3
    assert len(asked) == 1
    assert "format" in asked[0][1]
