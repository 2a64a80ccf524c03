"""LiNeS: a merged difference scaled by depth, least in the first block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_peft import merge_function
from lightning_peft.arguments import one_of
from lightning_peft.merging.merge_function import Stacks
from lightning_peft_plugins.merging._shared import signs

Combine = Callable[[Tensor], Tensor]


def combined(stacks: Stacks, combine: str, density: float) -> Combine:
    """Return what merges differences before they are scaled."""
    one_of("combine", combine, ("sum", "elect"))
    if combine == "elect":
        return signs.election(stacks, density, signs.disjoint_mean)
    return lambda deltas: deltas.sum(0)


def first(stacks: Stacks, combined: Combine) -> Tensor:
    """Return the scale of the first block: the mean difference's L1 norm over the merged one's."""
    norms = torch.zeros(2, dtype=torch.float64)
    for piece in stacks():
        norms += torch.stack([each.abs().sum(dtype=torch.float64) for each in (piece.mean(0), combined(piece))])
    return torch.where(norms[1] > 0, norms[0] / norms[1], 1.0)


@merge_function(elementwise=True, surveys={"combined": combined, "first": first})
def lines(
    deltas: Tensor,
    depth: float,
    combined: Combine,
    first: Tensor,
    *,
    growth: float = 0.5,
    combine: Literal["sum", "elect"] = "sum",
    density: float = 0.2,
) -> Tensor:
    """Scale what several models changed by depth (Wang et al., ICLR 2025, https://arxiv.org/abs/2410.17146, section 4).

    Early blocks, which serve all tasks, change least. For one model, ``scale=(0.2, 1.0)`` of the merge does the same.

    Args:
        deltas: Differences to the base, ``(n, *shape)``.
        depth: From 0, the first block and what is outside of blocks, to 1, the last.
        combined: Merges differences, ``(n, *shape)`` to ``(*shape)``.
        first: Scale at depth 0.
        growth: How much more the scale is in the last block, ``beta`` in the paper, to be found on validation data.
        combine: ``"sum"``, as task arithmetic, or ``"elect"``, as TIES.
        density: Share of each model's differences that stays with ``"elect"``.

    Returns:
        The merged difference, ``(*shape)``.

    Example:
        >>> lines(torch.ones(2, 3), 0.5, lambda deltas: deltas.sum(0), torch.tensor(0.5), growth=1.0)
        tensor([2., 2., 2.])
    """
    return combined(deltas).mul_(float(first) + growth * depth)
