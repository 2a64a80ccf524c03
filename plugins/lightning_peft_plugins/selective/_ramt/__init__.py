"""What RAMT alone needs."""
