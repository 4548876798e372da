"""The channel graph: labels followed through real passes show what is coupled across layers."""
