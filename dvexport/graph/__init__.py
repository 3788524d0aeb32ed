"""ONNX graphs: reading, constants, states, weights and files. Nothing here knows a gate."""
