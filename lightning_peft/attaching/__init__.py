"""Everything that touches the user's module during a run: the hub, the plan, what it saves, edits and averages.

No method lives here, and nothing here knows what a method computes.
"""
