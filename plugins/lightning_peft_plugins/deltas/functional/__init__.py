"""The mathematics of deltas as pure functions: tensors in, tensors out."""
