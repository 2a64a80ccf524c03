"""The mathematics of merging that is of use by itself: tensors in, tensors out."""
