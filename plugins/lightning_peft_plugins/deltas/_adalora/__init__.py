"""What AdaLoRA alone needs: how much every triplet matters, and its type in folders of Hugging Face PEFT."""
