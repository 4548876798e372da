"""Statistics for criteria: running sums of gradients and activations, and losses on calibration batches."""
