"""What BlockPruning alone needs: what passes through blocks, what they weigh, how many go."""
