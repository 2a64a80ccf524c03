"""Switching what a method attached off and on."""

from __future__ import annotations

from types import TracebackType

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.compose.lanes import Lane
from lightning_peft.weights.attachment import Attachment
from lightning_peft.weights.detach import attachments
from lightning_peft.weights.merge import check_unmerged


class switch:  # noqa: N801 - used as a function, and as a context manager like torch.set_grad_enabled
    """Switch the weight maps and layer parts of one method on or off: at once, and back at the end of a ``with`` block.

    Works while a method trains, to ask the network without its adapter for one, and afterwards on what a method with
    ``stays = True`` left on the module. Switches are saved with the module's checkpoints.

    Args:
        module: The module, or any part of it.
        method: Name of the method, ``"lora"`` for a class ``LoRA`` that was given no other.
        on: Whether they take part from now on.

    Raises:
        MisconfigurationException: The method has nothing on the module, or stores weights in another form: without the map
            they would mean nothing; or its parts are merged, see :func:`lightning_peft.merge`.

    Example:
        .. code-block:: python

            with lightning_peft.switch(module, "lora", on=False):
                reference = module(batch)
    """

    def __init__(self, module: nn.Module, method: str, on: bool = True) -> None:
        self._before = [(each, each.enabled) for each in _of(module, method)]
        for each, _ in self._before:
            each.enabled = on

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for each, enabled in self._before:
            each.enabled = enabled


def _of(module: nn.Module, method: str) -> list[Attachment]:
    check_unmerged(module, "a switch")
    present = attachments(module)
    found = [each for each in present if each.method == method]
    if not found:
        names = ", ".join(sorted({each.method for each in present})) or "nothing at all"
        raise MisconfigurationException(
            f"{method!r} has neither weight maps nor layer parts on this module; there is {names}. They are on it during a "
            "fit, and afterwards where the method has stays = True."
        )
    if bound := next((each for each in found if each.lane == Lane.REPARAM), None):
        raise MisconfigurationException(
            f"{bound.owner} stores weights in another form, and without {bound.kind!r} they would mean nothing, so it cannot "
            "be switched off. lightning_peft.bake(module) turns them into ordinary weights."
        )
    return found
