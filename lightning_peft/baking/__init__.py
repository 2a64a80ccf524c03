"""Ways out of training: baking into an ordinary module, folders, portable programs, packed layers, proofs about them.

Works on modules and on files; never needs a Trainer, and measures and reports nothing.
"""
