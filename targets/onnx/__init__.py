"""The ONNX Runtime backend: standard operators only, so the artifact runs in a stock runtime."""

from dvexport.targets.onnx.backend import ARTIFACT, emit

__all__ = ["ARTIFACT", "emit"]
