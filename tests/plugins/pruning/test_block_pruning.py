"""BlockPruning in training."""

from __future__ import annotations

from lightning_peft.testing import MethodTester
from lightning_peft.testing.modules import deepened
from lightning_peft_plugins.pruning.block_pruning import BlockPruning


class TestBlockPruning(MethodTester):
    # The second cut comes after the first of three epochs, whose checkpoint a class that knows nothing of cuts loads baked.
    methods = [lambda: BlockPruning(0.5, start="50%", end="75%", every=1, shape="linear")]
    adapted = staticmethod(deepened)
    removed_parts = "blocks leave"
