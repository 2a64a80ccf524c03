"""What LoRA-GGPO alone needs: a form with a random matrix in training steps, and the part that has it read the inputs."""
