"""Convolution kernels: direct and Winograd."""
