"""One fit of a Trainer: pruning events, hooks in training steps, guard, rewinding, calibration batches."""
