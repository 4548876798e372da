"""Statistics of training: running sums of gradients and activations, and losses on calibration batches."""
