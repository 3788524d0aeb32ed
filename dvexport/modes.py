"""How an artifact takes frames."""

from __future__ import annotations

__all__ = ["MODES"]

MODES = ("stream", "clip")
"""`stream`: one frame a step, explicit state in and out. `clip`: all frames at once."""
