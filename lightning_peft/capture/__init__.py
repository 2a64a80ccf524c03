"""Seeing what runs without changing it: shims, taps on a network's calls, the samples a loader draws.

Everything here comes off without a trace; nothing here knows a method, a plan or a weight map.
"""
