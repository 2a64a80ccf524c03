"""Methods that leave most weights zero in a fixed pattern.

Patterns and masks live here; removing whole channels or blocks belongs to `pruning`.
"""
