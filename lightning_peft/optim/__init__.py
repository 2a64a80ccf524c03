"""Optimizers and schedulers by the names of parameters: finding, moving and restarting their state.

Knows torch's optimizers and Lightning's schedulers, and no method.
"""
