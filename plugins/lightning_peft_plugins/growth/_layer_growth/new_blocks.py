"""The blocks that growth has added to a module."""

from __future__ import annotations

from torch import nn

from lightning_peft.structure.depth import blocks_at
from lightning_peft.structure.journal import journal_of


def new_blocks(module: nn.Module, by: str) -> list[nn.Module]:
    """Return the blocks that are copies made by a method, as the module's journal says.

    Args:
        module: The module.
        by: Name of the method.
    """
    new: dict[str, set[int]] = {}
    for edit in journal_of(module):
        if edit["op"] != "blocks":
            continue
        sources, before = edit["sources"], new.get(edit["path"], set())
        copies = {place for place, source in enumerate(sources) if source in sources[:place]}
        stayed = {place for place, source in enumerate(sources) if source in before}
        new[edit["path"]] = stayed | (copies if edit.get("by") == by else set())
    return [blocks_at(module, path)[place] for path, places in new.items() for place in sorted(places)]
