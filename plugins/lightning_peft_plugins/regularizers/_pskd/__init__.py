"""Helpers of PSKD: the memory of predictions and the way into it."""
