"""What IncreLoRA alone needs: a form with room for further ranks, and its score from the calls of a layer."""
