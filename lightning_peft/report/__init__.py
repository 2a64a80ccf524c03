"""Reports on trainings, deployments and adaptations: facts, tables and figures as HTML, Markdown and JSON.

Reads what was measured and saved; nothing here trains, measures or changes a module.
"""
