"""LoRA and DoRA: train little, on either side of a layer, and go into the weight."""

from __future__ import annotations

from lightning_peft.testing import MethodTester
from lightning_peft_plugins.deltas._shared.product_delta import ProductDelta
from lightning_peft_plugins.deltas.dora import DoRA
from lightning_peft_plugins.deltas.lora import LoRA


class TestLoRA(MethodTester):
    methods = [
        lambda: LoRA(rank=2, exclude=None, checkpoint="full"),
        lambda: LoRA(rank=2, alpha=4, tune=("head",), checkpoint="full"),
        lambda: LoRA(rank=2, scaling="root", targets="all-weights", checkpoint="full"),
        lambda: LoRA(rank=2, lr_ratio=4, tune=("bias",), checkpoint="full"),
        lambda: ProductDelta(rank=2, alpha=1, scaling="root", tune=("bias", "norm"), checkpoint="full"),
    ]


class TestDoRA(MethodTester):
    methods = [
        lambda: DoRA(rank=2, exclude=None, checkpoint="full"),
        lambda: DoRA(rank=2, alpha=4, targets="all-weights", tune=("bias",), checkpoint="full"),
    ]
