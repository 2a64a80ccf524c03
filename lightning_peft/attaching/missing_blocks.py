"""Networks that do not follow a list whose length changes: refused in words, because what forward raises names no list."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.structure.depth import blocks_at
from lightning_peft.structure.edit_types import BlocksEdit
from lightning_peft.structure.journal import journal_of

# Errors that code of networks raises; one of a kind of its own (out of memory, a user's) means what it says.
FAILURES = (IndexError, KeyError, RuntimeError, AssertionError, ValueError, TypeError)


def no_chain(edit: BlocksEdit, error: Exception) -> str:
    """Say what an error in the first step after an edit of blocks may mean."""
    return (
        f"{type(error).__name__}: {str(error).partition(chr(10))[0]}. This was the first step after {edit['path']} went from "
        f"{edit['from']} to {len(edit['sources'])} blocks. If the module trains without that, the list is no chain of blocks: "
        "their results are put side by side, or counted somewhere else too. Name another list (blocks= for growth, targets= "
        "for pruning)."
    )


class MissingBlocks:
    """Stands around the steps of a module whose lists may get shorter or longer.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._edits: int | None = None  # in the journal when a step was last run to its end

    def step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a step.

        Raises:
            MisconfigurationException: It asked a list for a block that left it, or failed in another way in the first step
                after the list changed; names the list and the cure.
        """
        try:
            result = inner(*args, **kwargs)
        except Exception as error:
            reason = self._left(error) if isinstance(error, IndexError) else None
            reason = reason or self._first_step(error)
            if reason is None:
                raise
            raise MisconfigurationException(reason) from error
        self._edits = len(journal_of(self._module))
        return result

    def _first_step(self, error: Exception) -> str | None:
        if type(error) not in FAILURES:
            return None
        running = [owner for owner in _running(error) if owner is not self._module]
        for edit in journal_of(self._module)[self._edits or 0 :]:
            # The first step of all may fail by itself: then the part that holds the list must be among those that ran.
            holder = self._module.get_submodule(edit["path"].rpartition(".")[0])
            blamed = self._edits is not None or any(owner is holder for owner in running)
            if edit["op"] == "blocks" and len(edit["sources"]) != edit["from"] and blamed:
                return no_chain(edit, error)
        return None

    def _left(self, error: IndexError) -> str | None:
        asked = _running(error)
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


def _running(error: Exception) -> list[object]:
    """The objects whose methods ran when an error was raised."""
    return [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
