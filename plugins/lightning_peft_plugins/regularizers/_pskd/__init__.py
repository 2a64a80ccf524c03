"""What PSKD alone needs: the memory of predictions and the way into it."""
