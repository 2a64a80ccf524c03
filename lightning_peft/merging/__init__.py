"""Merging models that were trained from one start: files and state dicts in, one state dict out, a piece of a tensor at a time.

How values are combined stands in functions of plugins; here are reading, checking, surveying, writing. Nothing here trains.
"""
