"""Names that outlive a process: optimizer access by name and the library's part of a checkpoint.

Nothing here computes a method; it only moves state between runs.
"""
