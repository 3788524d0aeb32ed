"""Rewrites of a lowered graph for what ONNX Runtime does well."""
