"""What SaRA alone needs."""
