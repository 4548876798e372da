"""Selectors: the choice of the units to remove, given the scores of each unit group."""
