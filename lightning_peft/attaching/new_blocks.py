"""New blocks that the network does not run: refused after the first step, because nothing else would show it."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.structure.depth import blocks_at
from lightning_peft.structure.edits import Change

_PATIENCE = 30  # steps until blocks that a network may drop at random have been seen to run


class NewBlocks:
    """Watches whether gradients reach the blocks that edits have added.

    Gradients say it without a hook on any block, and a block that never gets one is never trained.
    """

    def __init__(self) -> None:
        self._awaited: dict[str, tuple[int, int]] = {}

    def added(self, change: Change) -> None:
        """Expect gradients on what an edit has added to a list."""
        edit = change.edit
        if edit["op"] == "blocks":
            self._awaited.pop(edit["path"], None)
            if len(edit["sources"]) > edit["from"]:
                self._awaited[edit["path"]] = (edit["from"], 0)

    def check(self, module: nn.Module) -> None:
        """Look at the gradients of a step.

        Raises:
            MisconfigurationException: They reached a list, and none of its blocks beyond the number it had before.
        """
        for path, (before, steps) in list(self._awaited.items()):
            blocks = list(blocks_at(module, path))
            if not any(map(_has_gradient, blocks)):
                continue  # a step of another part of the module
            trained = [block for block in blocks[before:] if any(tensor.requires_grad for tensor in block.parameters())]
            if not trained or any(map(_has_gradient, trained)):
                del self._awaited[path]
            elif _drops(module, path) and steps + 1 < _PATIENCE:
                self._awaited[path] = (before, steps + 1)
            else:
                raise MisconfigurationException(
                    f"{path} has {len(blocks)} blocks since it grew, but none after the first {before} ran in the step that "
                    f"followed: a loop in forward runs as many as there were, as `for i in range(n)` with the old n does, or "
                    "`zip` with a list that did not grow. Loop over the list itself, `for block in "
                    f"self.{path.rpartition('.')[2]}:`, and keep what belongs to a block inside it."
                )


def _has_gradient(block: nn.Module) -> bool:
    return any(tensor.grad is not None for tensor in block.parameters())


def _drops(module: nn.Module, path: str) -> bool:
    """Whether the network says that it leaves out blocks at random."""
    parts = path.split(".")
    owners = [module.get_submodule(".".join(parts[:length])) for length in range(len(parts))]
    notes = [note for owner in owners for note in (vars(owner), getattr(vars(owner).get("config"), "__dict__", {}))]
    return any(
        "layerdrop" in key.replace("_", "").lower() and isinstance(value, float) and value > 0
        for note in notes
        for key, value in note.items()
    )
