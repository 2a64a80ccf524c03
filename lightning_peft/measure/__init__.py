"""Figures about a network: clocks, FLOPs, memory, calibration.

Measures and gives numbers back; how they are shown is the business of ``report``.
"""
