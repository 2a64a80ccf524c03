"""What several pruning methods share: timeline, scores, and the statistics these are made of."""
