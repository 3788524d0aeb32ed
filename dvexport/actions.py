"""The actions of an output channel, for code that runs without torch (`dvexport.gates` has them too)."""

__all__ = ["COMPUTE", "REUSE", "SKIP"]

SKIP, REUSE, COMPUTE = 0, 1, 2
