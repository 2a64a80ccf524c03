"""Helpers of BlockPruning: activations of blocks, scores of their weights, the number that leave."""
