"""DARE: drop differences at random and rescale the rest, before they are merged."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor

from lightning_peft import merge_function
from lightning_peft.arguments import one_of
from lightning_peft_plugins.merging._shared import signs


@merge_function(elementwise=True)
def dare(
    deltas: Tensor,
    weights: Tensor,
    generators: list[Generator],
    *,
    density: float = 0.1,
    rescale: float | None = None,
    combine: Literal["sum", "elect"] = "sum",
) -> Tensor:
    """Keep each difference with a probability, and divide by it (Yu et al., ICML 2024, https://arxiv.org/abs/2311.03099).

    Args:
        deltas: Differences to the base, ``(n, *shape)``.
        weights: ``(n,)``, what each is multiplied by.
        generators: One a model.
        density: Probability that a difference stays, ``1 - p`` in the paper.
        rescale: What kept differences are divided by, ``q`` of DAREx-q (Deng et al., ICLR 2025,
            https://arxiv.org/abs/2410.09344), to be found on validation data; the density by default, which is DARE.
        combine: ``"sum"``, as task arithmetic, or ``"elect"``: the mean of those that agree in sign, as TIES.

    Returns:
        The merged difference, ``(*shape)``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> dare(torch.ones(1, 4), torch.ones(1), [generator], density=0.5)
        tensor([2., 0., 2., 2.])
    """
    one_of("combine", combine, ("sum", "elect"))
    signs.check_density(density)
    kept = torch.stack([torch.rand(row.shape, generator=own) for row, own in zip(deltas, generators, strict=True)]) < density
    factors = (weights / (rescale or density)).to(deltas.dtype).view(-1, *[1] * (deltas.dim() - 1))
    rest = deltas * kept * factors
    if combine == "sum":
        return rest.sum(0)
    return signs.disjoint_mean(rest, signs.elected(rest, lambda: rest.new_ones(())))
