"""The processor that kernels are generated for: data only."""
