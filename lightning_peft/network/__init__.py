"""The anatomy of a module: its network, its layers, targets, lists of equal blocks, graph, logits and labels.

Asks modules and changes none; nothing here knows a weight map or a method.
"""
