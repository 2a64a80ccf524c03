"""Low-rank and other deltas of frozen weights."""
