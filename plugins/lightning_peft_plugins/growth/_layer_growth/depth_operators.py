"""Growth in depth: which block each new one comes from, and what is changed of its copy.

An operator is written as the old position of every block of the grown list; the first to name a position is that block itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.structure.block_names import block_name
from lightning_peft.structure.edits import Edit


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
    found = {}
    for place in new_places(edit["sources"]):
        source = block_name(edit, edit["sources"][place])
        for name in edit["zeroed"]:
            if f"{source}.{name}" in values:  # blocks can be of several kinds
                found[f"{block_name(edit, place)}.{name}"] = torch.zeros_like(values[f"{source}.{name}"])
    return found


def drawn(values: Mapping[str, Tensor], edit: Edit, generator: torch.Generator) -> dict[str, Tensor]:
    """New blocks from N(0, 0.02), norms and biases as in their source: MSG's mask lets them in gradually."""
    found = {}
    for place in new_places(edit["sources"]):
        source = f"{block_name(edit, edit['sources'][place])}."
        for name, value in values.items():
            if name.startswith(source) and value.ndim > 1:
                noise = torch.randn(value.shape, generator=generator) * 0.02
                found[f"{block_name(edit, place)}.{name.removeprefix(source)}"] = noise.to(value)
    return found
