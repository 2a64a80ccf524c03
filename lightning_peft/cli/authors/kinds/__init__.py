"""The kinds of methods that `lightning-peft new` writes, one file each: a tiny method that works, for its author to replace.

Only text lives here, filled in as :class:`string.Template` does it; nothing here imports the engine.
"""
