"""StructuredPruning in training."""

from __future__ import annotations

import pytest

from lightning_peft import StructuredPruning
from lightning_peft.testing import MethodTester

pytest.importorskip("torch_pruning")


class TestStructuredPruning(MethodTester):
    # Cuts come after the first of three epochs, whose checkpoint a class that knows nothing of cuts must load baked, but before
    # the end of one.
    methods = [
        lambda: StructuredPruning(0.4, start="60%"),
        lambda: StructuredPruning(0.5, "taylor", of="flops", start="45%", end="75%", every=1, round_to=2),
    ]
    no_teacher = r"teacher\.0.*did not contribute to the output of the network.*network="
    no_styles = {"TwoOptimizers": "its generator has no part in a call of the module, and network= must name the other part"}
