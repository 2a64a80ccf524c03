"""Ways to merge models: one plain function a file, from one tensor of every model to that of the merged one.

They hold no state, read no file and know no network; what they need from all tensors at once, their surveys find.
"""
