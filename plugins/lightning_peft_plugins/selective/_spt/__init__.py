"""What SPT alone needs."""
