"""Ranges of every number that a video or a preprocessing brings from outside, each with its reason.

No torch and no numpy here, so that reading a bundle's manifest stays cheap.
"""

from __future__ import annotations

__all__ = [
    "FORMATS",
    "FRAME_RATE",
    "MAX_ASPECT",
    "MAX_CLIP_PIXELS",
    "MAX_FRAMES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "MAX_STRIDE",
    "MAX_VIEWS",
    "MEAN",
    "STD",
]

MAX_SIDE = 1 << 14
"""The longest side of a frame, in pixels: a bundle that says more asks for all memory."""

MAX_PIXELS = 1 << 26
"""Pixels of a frame as it is decoded or scaled: 8192 x 8192, twice what 8K video has, 200 MB as RGB."""

MAX_ASPECT = 32
"""Long side over short side of a frame: the crop of a wider one shows less than a 32nd of it."""

MAX_FRAMES = 1024
"""Frames of a clip, which are held in memory: at 224 x 224 so many take 0.6 GB."""

MAX_CLIP_PIXELS = 1 << 28
"""Pixels of all frames of all clips and crops together: 3.2 GB as float32."""

MAX_STRIDE = 256
"""Frames from one frame of a dense clip to the next: ten seconds of common video."""

MAX_VIEWS = 64
"""Clips of a video times crops of a clip: each is a run of the model, and published recipes have 15 at most."""

MEAN = (-10.0, 10.0)
"""Pixels lie in 0..1, so a mean lies there too; the range leaves room and stays far from overflow."""

STD = (1e-3, 1e3)
"""Training on levels of 0..255 is a std of 1/255; below that float32 has too few digits for a pixel."""

FRAME_RATE = (0.01, 1000.0)
"""Frames a second: a frame in 100 s, a time lapse, to a high-speed camera."""

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska,webm",
    "mpegts",
    "mpeg",
    "avi",
    "flv",
    "ogg",
    "asf",
    "ivf",
    "gif",
    "apng",
    "h264",
    "hevc",
    "m4v",
    "mjpeg",
    "mpegvideo",
    "yuv4mpegpipe",
    "png_pipe",
    "jpeg_pipe",
    "webp",
    "webp_pipe",
    "bmp_pipe",
    "tiff_pipe",
    "ppm_pipe",
    "pgm_pipe",
)
"""FFmpeg's demuxers that are used: one file of video or of an image.

Other demuxers turn text into pictures (`tty`), run filters (`lavfi`), or open what a file names (`hls`,
`concat`, `dash`, `sdp`, `image2` patterns).
"""
