"""Channel pruning: trace which slices of which tensors are coupled, and remove them from a model."""
