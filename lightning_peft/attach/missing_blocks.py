"""Blocks that the network asks for after they left: refused in words, because an index error in its forward names no list."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.structure.depth import blocks_at
from lightning_peft.structure.journal import journal_of


class MissingBlocks:
    """Stands around the steps of a module whose lists may get shorter.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a step.

        Raises:
            MisconfigurationException: It asked a list for a block that left it; names the list and the cure.
        """
        try:
            return inner(*args, **kwargs)
        except IndexError as error:
            reason = self._reason(error)
            if reason is None:
                raise
            raise MisconfigurationException(reason) from error

    def _reason(self, error: IndexError) -> str | None:
        asked = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        shorter = {edit["path"]: edit["from"] for edit in journal_of(self._module) if edit["op"] == "blocks"}
        for path, before in shorter.items():
            blocks = blocks_at(self._module, path)
            if len(blocks) < before and any(each is blocks for each in asked):
                name = path.rpartition(".")[2]
                return (
                    f"{path} has {len(blocks)} blocks now, of {before}, and forward asks for one that is gone: it counts to a "
                    f"fixed number, as `for i in range({before}): ... self.{name}[i]` does. Loop over the list itself, "
                    f"`for block in self.{name}:`."
                )
        return None
