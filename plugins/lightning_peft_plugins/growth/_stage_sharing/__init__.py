"""What StageSharing alone needs."""
