"""Networks that count their blocks elsewhere: refused in words, because an index error in a forward names no list."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.structure.depth import blocks_at
from lightning_peft.structure.journal import journal_of


class MissingBlocks:
    """Stands around the steps of a module whose lists may get shorter or longer.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._edits = len(journal_of(module))  # when a step was last run to its end

    def step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a step.

        Raises:
            MisconfigurationException: It asked a list for a block that left it, or something else for one that is new; names
                the list and the cure.
        """
        try:
            result = inner(*args, **kwargs)
        except IndexError as error:
            reason = self._left(error) or self._new()
            if reason is None:
                raise
            raise MisconfigurationException(reason) from error
        self._edits = len(journal_of(self._module))
        return result

    def _new(self) -> str | None:
        for edit in journal_of(self._module)[self._edits :]:
            if edit["op"] == "blocks" and len(edit["sources"]) > edit["from"]:
                return (
                    f"The step ended in an IndexError when {edit['path']} had just grown from {edit['from']} to "
                    f"{len(edit['sources'])} blocks: the network counts them somewhere else too, and would fail as well if its "
                    "class built it with as many. Look at the error above, or name another list with blocks=."
                )
        return None

    def _left(self, error: IndexError) -> str | None:
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
