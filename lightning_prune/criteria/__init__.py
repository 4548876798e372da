"""Criteria: how much each unit matters, as a score from its weights, gradients, activations or the loss."""
