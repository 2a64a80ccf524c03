"""The mathematics of growth as pure functions: tensors and numbers in, tensors and numbers out."""
