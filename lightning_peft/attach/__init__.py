"""Everything that touches the user's module from outside: the hub, its shims and taps, and how targets are named.

No method lives here, and nothing here knows what a method computes.
"""
