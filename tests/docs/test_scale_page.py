"""The page on strategies names the methods that say they work under FSDP2, and under tensor parallelism."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_peft import Lane, registry
from lightning_peft.contract import SHARDED, SPLIT

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


@pytest.mark.parametrize(
    ("beginning", "kinds", "adapts"),
    [
        ("| `ModelParallelStrategy` (FSDP2), in a fit", SHARDED, False),
        ("| the same with `tensor_parallel_size`", SPLIT, False),
        ("| `ModelParallelStrategy` (FSDP2), in an evaluation", SHARDED, True),
    ],
)
def test_the_table_names_the_methods_that_say_so(beginning: str, kinds: frozenset[str], adapts: bool) -> None:
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(beginning))
    methods = {name: entry.load() for name, entry in registry.installed().items()}
    declared = {name for name, each in methods.items() if each.strategies >= kinds and (each.lane == Lane.ADAPT) == adapts}
    assert set(re.findall(r"`(\w+)`", row.split("|")[2])) - {"permute"} == declared
