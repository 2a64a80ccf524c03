"""What NMSparsity alone needs: its weight map and its phases."""
