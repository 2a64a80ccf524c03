"""Consensus merging: a merged difference without the entries that few tasks use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from lightning_peft import merge_function
from lightning_peft.arguments import not_negative, one_of
from lightning_peft.merging.merge_function import Stacks
from lightning_peft_plugins.merging._shared import signs
from lightning_peft_plugins.merging.functional.tall_masks import tall_masks

Combine = Callable[[Tensor], Tensor]


def combined(stacks: Stacks, combine: str, density: float) -> Combine:
    """Return what merges differences before entries are left out."""
    one_of("combine", combine, ("sum", "elect"))
    if combine == "elect":
        return signs.election(stacks, density, signs.disjoint_sum)
    return lambda deltas: deltas.sum(0)


@merge_function(elementwise=True, surveys={"combined": combined})
def consensus(
    deltas: Tensor,
    combined: Combine,
    *,
    tasks: int = 2,
    strictness: float = 0.4,
    combine: Literal["sum", "elect"] = "sum",
    density: float = 0.2,
) -> Tensor:
    """Leave out what fewer tasks use than are asked for (Wang et al., ICML 2024, https://arxiv.org/abs/2405.07813).

    Args:
        deltas: Differences to the base, ``(n, *shape)``.
        combined: Merges differences, ``(n, *shape)`` to ``(*shape)``.
        tasks: How many tasks must use an entry; of fewer models all must.
        strictness: Of the masks, see ``lightning_peft.functional.tall_masks``.
        combine: ``"sum"``, as task arithmetic, or ``"elect"``: the sum of what agrees in sign, as TIES elects it.
        density: Share of each model's differences that stays with ``"elect"``.

    Returns:
        The merged difference, ``(*shape)``.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 3.0, 1.0])
        >>> consensus(torch.stack([one, two]), lambda deltas: deltas.sum(0))
        tensor([0., 0., 2.])
    """
    not_negative("strictness", strictness)
    merged = combined(deltas)
    return merged * (tall_masks(deltas, merged, strictness).sum(0) >= min(tasks, len(deltas)))
