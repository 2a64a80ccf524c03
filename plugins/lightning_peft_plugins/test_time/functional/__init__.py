"""The mathematics of test-time adaptation as pure functions: tensors in, tensors out."""
