"""Reports: what a network has lost and what it costs, in numbers, tables and plots."""
