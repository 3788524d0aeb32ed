"""Graph passes over gate-level ONNX, one a file; `dvexport.passes.pipeline` has their order."""
