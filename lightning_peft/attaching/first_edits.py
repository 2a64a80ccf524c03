"""Edits that methods ask for before a training begins."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule

from lightning_peft.compose.lanes import Lane
from lightning_peft.contract import Contract
from lightning_peft.structure import journal
from lightning_peft.structure.edits import Edit


class FirstEdits:
    """Gives a module the structure that its training begins with, and its own one back when nothing came of that.

    Args:
        module: The module.
        methods: All methods, in plan order.

    Attributes:
        made: The edits.
    """

    def __init__(self, module: LightningModule, methods: Sequence[Contract]) -> None:
        self._module, self._methods = module, methods
        self.made: list[Edit] = []

    def make(self) -> None:
        """Let methods of lane ``STRUCTURE`` edit, unless the module has been through an edit already."""
        if journal.journal_of(self._module):
            return
        for method in self._methods:
            request = method.first_edit(self._module) if method.lane == Lane.STRUCTURE else None
            if request is not None:
                self.made.append(journal.edit(self._module, request.edit).edit)

    def undo(self, *, trained: bool) -> None:
        """Take the edits back, unless something was trained or loaded in another structure since."""
        if not trained and journal.journal_of(self._module) == self.made:
            for _ in self.made:
                journal.take_back(self._module)
