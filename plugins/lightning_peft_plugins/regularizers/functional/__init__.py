"""The mathematics of the regularisers as pure functions: tensors in, tensors out."""
