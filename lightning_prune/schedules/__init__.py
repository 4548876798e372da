"""Schedules: the share of the target that is removed at each point of training."""
