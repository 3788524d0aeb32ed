"""Clips: decoding, sampling and preprocessing."""
