"""Merging the parts on a module into its weights for a while, with the way back."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.weights.mapped_layer import is_mapped
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.part_stack import PartStack
from lightning_peft.weights.parts import part_stacks


class merge:  # noqa: N801 - used as a function, and as a context manager like torch.set_grad_enabled
    """Put the layer parts that stay on a module into its weights, so that calls cost what those of an ordinary network do.

    At once, and taken back by :func:`unmerge` or at the end of a ``with`` block, to the bit: the weights without the parts are
    kept, one copy of what is merged. Files hold those meanwhile, and a fit takes the parts out of the weights first. What is
    on a weight that has maps stays as it is. :func:`lightning_peft.bake` has no way back and needs no copy.

    Args:
        module: The module, with what trainings with ``keep=True`` or :func:`lightning_peft.load_peft` left on it, or a part
            of it.

    Raises:
        MisconfigurationException: Nothing on the module can go into a weight; a part computes what no weight does, or
            holds a number that is not finite. Nothing was changed then.

    Example:
        .. code-block:: python

            lightning_peft.load_peft(module, "adapter")
            with lightning_peft.merge(module):
                predictions = trainer.predict(module, loader)
    """

    def __init__(self, module: nn.Module) -> None:
        self._stacks = [(layer, stack) for path, layer, stack in part_stacks(module) if _is_to_merge(path, layer, stack)]
        if not self._stacks:
            mapped = next(
                (f"{each.name} has {each.maps[0].kind!r} of {each.maps[0].owner}" for each in mapped_tensors(module)), ""
            )
            raise MisconfigurationException(
                "The module has no layer parts that could be merged, or they are merged already. They are on it after a fit "
                "with keep=True, and after lightning_peft.load_peft(module, folder)."
                + (f" {mapped}, which acts on the weight: lightning_peft.bake(module) merges that for good." if mapped else "")
            )
        with torch.no_grad():
            for layer, stack in self._stacks:
                own: dict[str, Any] = {name: layer._parameters[name] for name in stack.into(layer)}
                merged = {name: stack.merged(name, tensor) for name, tensor in own.items()}
                stack.beneath = {name: tensor.detach().clone() for name, tensor in own.items()}
                for name, tensor in own.items():
                    tensor.copy_(merged[name])

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for layer, stack in self._stacks:
            stack.take_out(layer)


def unmerge(module: nn.Module) -> None:
    """Take parts out of the weights that :func:`merge` put them into; they stand beside their layers again.

    Args:
        module: The module; it may have nothing merged.
    """
    for _, layer, stack in part_stacks(module):
        stack.take_out(layer)


def check_unmerged(module: nn.Module, what: str) -> None:
    """Refuse to change parts that are in the weights: nothing would come of it.

    Raises:
        MisconfigurationException: There are such parts.
    """
    if any(stack.beneath for _, _, stack in part_stacks(module)):
        raise MisconfigurationException(
            f"The parts on the module are merged into its weights, so {what} would do nothing. Call "
            "lightning_peft.unmerge(module) first."
        )


def _is_to_merge(path: str, layer: nn.Module, stack: PartStack) -> bool:
    """Whether the parts of a layer go into its weights now; refuses those that cannot."""
    if stack.beneath or not stack.merging or any(is_mapped(layer, name) for name in stack.into(layer)):
        return False
    if other := next((part for part in stack if part.enabled and not part.merges), None):
        raise MisconfigurationException(
            f"The {other.kind} of {other.owner} on {path} computes something that no weight can. Switch it off first, "
            f"lightning_peft.switch(module, {other.method!r}, on=False), or leave everything unmerged."
        )
    for part in stack.merging:
        part.check_finite()
    return True
