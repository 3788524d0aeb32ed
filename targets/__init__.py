"""Devices (`catalog/`) and the backends that produce what they execute."""
