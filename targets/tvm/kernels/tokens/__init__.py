"""Kernels of transformers: matrix products, attention, normalisation, token choice."""
