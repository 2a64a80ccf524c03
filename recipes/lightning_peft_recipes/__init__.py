"""Recipes: LightningCLI files, and the small models and data modules they use.

Recipes may use plugins, the engine and optional libraries; nothing may import recipes. Importing this package loads none of
them.
"""

from lightning_peft_recipes.assets import ASSETS

__all__ = ["ASSETS"]
