"""What MixtureGrowth alone needs."""
