"""PeftAdapter keeps what every method owes, whatever tuner it is given."""

from __future__ import annotations

from typing import Any

from lightning_peft.testing import MethodTester
from lightning_peft_plugins.deltas.peft_adapter import PeftAdapter


def adapter(kind: str, **arguments: Any) -> PeftAdapter:
    return PeftAdapter({"peft_type": kind, **arguments}, targets="all-linear", checkpoint="full")


class TestPeftAdapter(MethodTester):
    methods = [
        lambda: adapter("LORA", r=2, use_dora=True),
        lambda: adapter("ADALORA", init_r=4, target_r=2, total_step=10, tinit=1),
        lambda: adapter("HRA", r=2),
    ]
    every_one_sharded = True  # tuners differ, and AdaLoRA is PEFT's own loop over whole adapters
