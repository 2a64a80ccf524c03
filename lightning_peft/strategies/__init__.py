"""Differences between Lightning's strategies, behind small functions.

Methods name kinds of strategies, never strategy classes.
"""
