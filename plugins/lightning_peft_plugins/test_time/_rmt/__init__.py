"""What only RMT needs."""
