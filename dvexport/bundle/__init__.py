"""The `.dvx` file: its archive, its manifest, and the traced models inside."""
