"""Kernels over planes: copies, elementwise operators, pooling."""
