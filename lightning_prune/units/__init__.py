"""Units: what can be removed, the masks that remove it, and what it costs."""
