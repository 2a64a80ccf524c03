"""How methods share one training step: lanes, the run and its clock, schedules, loss terms.

Nothing here touches a module; it only decides what happens in which order.
"""
