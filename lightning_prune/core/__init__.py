"""Helpers that are not about pruning: part base class, saved-state schemas, model copies, probes, files."""
