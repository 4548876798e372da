"""Structures: which weights of a model are pruned together, as unit groups, and which are frozen, and why."""
