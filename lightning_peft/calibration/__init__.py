"""Calibration: methods that look at a trained network block by block, each on what the blocks before it make of some batches.

Nothing here trains or knows a method by name; what a method does with a block is in its ``calibrate``.
"""
