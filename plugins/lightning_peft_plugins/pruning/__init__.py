"""Methods that decide which weights, channels, blocks or ranks a network can do without, and remove them.

Scores, groups and what is done to the rest combine freely; the fixed patterns of sparse tensor cores belong to `sparsity`.
"""
