"""Callbacks for a Trainer: pruning, and checkpointing and early stopping that wait for it."""
