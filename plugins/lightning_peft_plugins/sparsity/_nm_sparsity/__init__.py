"""Helpers of NMSparsity: its weight map and its phases."""
