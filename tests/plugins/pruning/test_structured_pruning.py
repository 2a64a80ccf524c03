"""StructuredPruning in training."""

from __future__ import annotations

import pytest

from lightning_peft import StructuredPruning
from lightning_peft.testing import MethodTester

pytest.importorskip("torch_pruning")


class TestStructuredPruning(MethodTester):
    methods = [
        # After the first epoch, whose checkpoint is baked and loaded by a class that knows nothing of cuts.
        lambda: StructuredPruning(0.4, start=5),
        lambda: StructuredPruning(0.5, "taylor", of="flops", start=5, end=9, every=2, round_to=2),
    ]
    no_styles = {"TwoOptimizers": "its generator has no part in a call of the module, and network= must name the other part"}
