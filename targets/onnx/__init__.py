"""The ONNX Runtime backend: standard operators only, so the artifact runs in a stock runtime."""
