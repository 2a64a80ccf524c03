"""The page on strategies names the methods that say they work under FSDP2, and under tensor parallelism."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_peft import registry
from lightning_peft.contract import SHARDED, SPLIT

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


@pytest.mark.parametrize(("row_of", "kinds"), [("ModelParallelStrategy", SHARDED), ("tensor_parallel_size", SPLIT)])
def test_the_table_names_the_methods_that_say_so(row_of: str, kinds: frozenset[str]) -> None:
    row = next(line for line in PAGE.read_text().splitlines() if row_of in line)
    declared = {name for name, entry in registry.installed().items() if entry.load().strategies >= kinds}
    assert set(re.findall(r"`(\w+)`", row.split("|")[2])) - {"permute"} == declared
