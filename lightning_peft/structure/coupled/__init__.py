"""Which channels and heads of a network belong together, found by asking it, and copies of it to prove claims about them on.

What to do with them (cut them, put them in another order) is up to methods; nothing here changes a network.
"""
