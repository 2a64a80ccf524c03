"""The methods that ship with lightning_peft: one family a folder, one method a file, each registered by entry point.

Plugins import the engine and torch; families do not import each other, and nothing the engine needs may live here.
"""
