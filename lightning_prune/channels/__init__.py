"""Channels: trace which slices of which tensors are coupled, and take them out of a network."""
