"""What RoTTA alone needs."""
