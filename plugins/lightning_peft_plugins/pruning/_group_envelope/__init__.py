"""What GroupEnvelope alone needs: its proximal operator, as a rule for what becomes of pruned weights."""
