"""Networks in files: ONNX, packed weights, checkpoints of compacted networks."""
