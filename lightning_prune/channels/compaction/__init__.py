"""Compaction: plan which slices of tensors to cut, check on a copy that outputs stay the same, and cut them."""
