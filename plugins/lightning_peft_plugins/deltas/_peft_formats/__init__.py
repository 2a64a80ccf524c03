"""Types of adapters in folders of Hugging Face PEFT, one file each: what their tensors are called, and which forms they are."""
