"""Kernel generators: each returns a `Kernel`, a TIR function with the ABI of `abi.py`."""
