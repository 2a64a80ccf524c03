"""What MaskedPruning and its variants alone need: their weight map, rewinding, decay."""
