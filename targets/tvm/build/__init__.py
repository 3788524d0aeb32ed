"""From kernels to machine code: compiling, caching and linking."""
