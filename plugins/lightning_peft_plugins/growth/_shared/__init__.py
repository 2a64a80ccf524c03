"""What the growth methods share: moments in a training and learning rates after them."""
