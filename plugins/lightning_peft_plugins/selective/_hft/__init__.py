"""The layers of a network by block and category, as HFT draws from them."""
