"""Channels: trace which slices of which tensors are coupled, cut them out of a model, time it by its widths."""
