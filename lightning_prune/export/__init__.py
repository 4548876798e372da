"""Files of pruned models: ONNX export, packed weights, and loading of compacted checkpoints."""
