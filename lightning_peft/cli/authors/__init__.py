"""For authors of methods: a new method's files, and everything that is derived from the entry points in `pyproject.toml`.

Works on a checkout, that is on files; nothing here imports a plugin.
"""
