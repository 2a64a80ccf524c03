"""The mathematics of the selective methods as pure functions: tensors in, tensors out."""
