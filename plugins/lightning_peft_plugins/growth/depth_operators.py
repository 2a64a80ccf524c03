"""Growth in depth: which block each new one comes from, and what is changed of its copy.

An operator is written as the old position of every block of the grown list; the first to name a position is that block itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft_plugins.growth.block_lists import residual_writers

Edit = dict[str, Any]


def stacked(now: int, to: int) -> list[int]:
    """Repeat the whole stack (G_stack, StackedBERT).

    Example:
        >>> stacked(2, 5)
        [0, 1, 0, 1, 0]
    """
    return [place % now for place in range(to)]


def interpolated(now: int, to: int) -> list[int]:
    """Repeat each block in its place.

    Example:
        >>> interpolated(2, 5)
        [0, 0, 0, 1, 1]
    """
    return [place * now // to for place in range(to)]


def last_repeated(now: int, to: int) -> list[int]:
    """Copy the last blocks on top (gradual stacking; the depth rule of bert2BERT's AKI).

    Example:
        >>> last_repeated(4, 6)
        [0, 1, 2, 3, 2, 3]
    """
    extra = to - now
    return list(range(now)) + [now - min(extra, now) + place % min(extra, now) for place in range(extra)]


def paired(now: int, to: int) -> list[int]:
    """Follow each of the last blocks by its twin (LEMON: pairs of a normal and a zero layer).

    Example:
        >>> paired(4, 6)
        [0, 1, 2, 2, 3, 3]

    Raises:
        MisconfigurationException: More than twice as many blocks.
    """
    if to > 2 * now:
        raise MisconfigurationException(
            f"LEMON at most doubles the depth; {now} blocks cannot become {to}. Grow in several events: to=[{2 * now}, {to}]."
        )
    single = 2 * now - to
    return [*range(single), *(place for old in range(single, now) for place in (old, old))]


def new_places(sources: list[int]) -> list[int]:
    """Places of copies in the grown list.

    Example:
        >>> new_places([0, 1, 0, 1])
        [2, 3]
    """
    seen: set[int] = set()
    return [place for place, source in enumerate(sources) if source in seen or seen.add(source)]  # type: ignore[func-returns-value]


def zeroed(values: Mapping[str, Tensor], edit: Edit, generator: torch.Generator) -> dict[str, Tensor]:
    """Copies that add nothing to the residual stream: the network computes what it did (G_zero, Net2DeeperNet)."""
    return {
        f"{edit['path']}.{place}.{name}": torch.zeros_like(values[f"{edit['path']}.{edit['sources'][place]}.{name}"])
        for place in new_places(edit["sources"])
        for name in edit["zeroed"]
    }


@dataclass(frozen=True)
class DepthOperator:
    """A way to deepen a network.

    Attributes:
        sources: ``(blocks now, blocks then)`` to the old position of every block.
        zeroes: Whether new blocks begin as the identity.
        optimizer_state: What the official code does with the optimizer.
        restart_steps: Whether it counts Adam's steps from 0 again.
        lr: What it does with the learning rate, in a word.
    """

    sources: Callable[[int, int], list[int]]
    zeroes: bool = False
    optimizer_state: str = "reset"
    restart_steps: bool = False
    lr: str = "continue"

    def settings(self, block: nn.Module, outputs: list[str]) -> dict[str, Any]:
        """What an edit must say for :func:`zeroed`."""
        return {"zeroed": residual_writers(block, outputs)} if self.zeroes else {}

    @property
    def values(self) -> Callable[..., dict[str, Tensor]] | None:
        """What gives new blocks other values than those of their source."""
        return zeroed if self.zeroes else None


DEPTH_OPERATORS = {
    "stack": DepthOperator(stacked, lr="rewarm:1%"),
    "interpolate": DepthOperator(interpolated, lr="rewarm:1%"),
    "last-k": DepthOperator(last_repeated, optimizer_state="pad"),
    "zero": DepthOperator(stacked, zeroes=True, optimizer_state="pad"),
    "stackedbert": DepthOperator(stacked, optimizer_state="copy", restart_steps=True),
    "net2net": DepthOperator(stacked, zeroes=True),
    "aki": DepthOperator(last_repeated),
    "lemon": DepthOperator(paired, zeroes=True),
}
