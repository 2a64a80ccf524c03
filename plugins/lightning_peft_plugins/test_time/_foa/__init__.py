"""What only FOA needs."""
