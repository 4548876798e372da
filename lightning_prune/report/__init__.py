"""Reports of pruned models: sparsity, sizes, multiply-adds and latency as numbers, tables and plots."""
