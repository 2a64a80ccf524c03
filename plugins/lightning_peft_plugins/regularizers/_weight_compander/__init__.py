"""Parts of the weight compander."""
