"""Measurements: two sides interleaved in one run, medians, ratios. `python -m benchmarks` runs them all."""
