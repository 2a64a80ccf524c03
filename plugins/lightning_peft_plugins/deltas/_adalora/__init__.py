"""What AdaLoRA alone needs: how much every triplet matters."""
