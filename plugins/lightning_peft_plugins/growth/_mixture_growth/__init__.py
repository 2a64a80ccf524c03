"""Helpers of MixtureGrowth."""
