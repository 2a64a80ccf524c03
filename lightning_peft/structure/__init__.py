"""Edits of a network as plain data, the journal they are replayed from, and the library's part of a checkpoint.

Nothing here decides on an edit; it carries them out and moves state across them.
"""
