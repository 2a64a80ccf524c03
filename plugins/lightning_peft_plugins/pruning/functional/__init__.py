"""The mathematics of pruning methods as pure functions: tensors in, tensors out."""
