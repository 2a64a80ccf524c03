"""What MiSS alone needs: its type in folders of Hugging Face PEFT."""
