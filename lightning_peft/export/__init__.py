"""Ways out of training: baking into an ordinary module and proofs about what was baked.

Works on modules and on files; never needs a Trainer.
"""
