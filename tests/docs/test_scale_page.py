"""The page on strategies names the methods that say they work under FSDP2."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_peft import registry
from lightning_peft.contract import SHARDED

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_the_table_names_the_methods_that_say_so() -> None:
    row = next(line for line in PAGE.read_text().splitlines() if "ModelParallelStrategy" in line)
    declared = {name for name, entry in registry.installed().items() if entry.load().strategies == SHARDED}
    assert set(re.findall(r"`(\w+)`", row.split("|")[2])) - {"permute"} == declared
