"""Layers of Hugging Face PEFT beside those of a module, for PeftAdapter."""
