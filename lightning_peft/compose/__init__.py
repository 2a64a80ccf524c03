"""How methods share one training step: lanes, the resolved plan and its conflicts, schedules, loss terms.

Nothing here touches a module; it only decides what happens in which order.
"""
