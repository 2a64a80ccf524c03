"""Methods that train a chosen part of the parameters a network has, or numbers that go into them, and leave the rest frozen.

Products of low rank beside the weights belong to `deltas`.
"""
