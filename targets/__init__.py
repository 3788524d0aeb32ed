"""Devices (`catalog/`) and the backends that produce what they execute."""

from dvexport.targets.catalogue import HOST, Target, host_name, load, names

__all__ = ["HOST", "Target", "host_name", "load", "names"]
