"""Unit groups, the masks that remove their units, and the cost of a network in parameters and MACs."""
