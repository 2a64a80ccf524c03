"""Whether new blocks pass on what they are given, as operators promise that zero their output layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Promise:
    """Compares input and output of new blocks in the user's own step, the first after growth.

    A block whose output is its input leaves the network what it was. Which layers write its result is found by their names, so
    only a call shows whether all were found.

    Args:
        blocks: New blocks by name.
        operator: Name of the operator.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], operator: str) -> None:
        self._operator = operator
        self._changes: dict[str, float] = {}
        self._handles: list[RemovableHandle] = []
        for name, block in blocks.items():
            self._handles.append(block.register_forward_hook(self._hook(name), with_kwargs=True))

    def _hook(self, name: str) -> Any:
        def compare(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            given, result = next(tensors_in([*args, *kwargs.values()]), None), next(tensors_in([output]), None)
            if name not in self._changes and given is not None and result is not None and given.shape == result.shape:
                self._changes[name] = _change(given, result)

        return compare

    def judge(self) -> bool:
        """Stop looking, and say by how much the promise was missed, if it was."""
        self.remove()
        missed = {name: change for name, change in self._changes.items() if change > 0}
        if missed:
            name = max(missed, key=lambda key: missed[key])
            rank_zero_warn(
                f"{self._operator!r} promises that the grown network computes what it did, but new blocks change what they are "
                f"given, {name} by {missed[name]:.1%} ({len(missed)} of {len(self._changes)} do). Either a layer that writes "
                "into the residual stream was not recognised: name all of them in a block with outputs=[...]; or the blocks "
                "normalise what they return (post-norm), and no operator keeps the function: choose 'stack', or 'msg'."
            )
        return bool(missed)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def tensors_in(values: Sequence[Any]) -> Iterator[Tensor]:
    """Floating-point tensors among values, tuples and lists of them too."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from tensors_in(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield value


@torch.no_grad()
def _change(given: Tensor, result: Tensor) -> float:
    """Length of what was added, relative to what was given; 0 where only rounding differs."""
    a, b = given.detach().double(), result.detach().double()
    change = float((b - a).norm() / a.norm().clamp_min(torch.finfo(torch.double).tiny))
    coarse = max(torch.finfo(given.dtype).eps, torch.finfo(result.dtype).eps)
    return change if change > 16 * coarse else 0.0
