"""The command line: finding, running and comparing recipes, and looking at what came out.

Commands parse and print; what they compute lives in the engine, so nothing here may be the only way to do something.
"""
