"""Shared by the growth methods: moments in a training and learning rates after them."""
