"""Methods that make a network larger while it trains, and the operators that give new layers and units their values.

How a structure is changed, recorded and replayed belongs to the engine's `structure`.
"""
