"""Helpers of MaskedPruning and its variants: their weight map, rewinding, decay."""
