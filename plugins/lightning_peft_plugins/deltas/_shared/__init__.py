"""What several deltas are made of: the method, forms, first values."""
