"""Ranks for weights by what their components explain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranks_by_share(shares: Sequence[Tensor], budget: int) -> list[int]:
    """Share a number of ranks out: the largest shares of all weights get one each (Paischer et al., EVA, arXiv 2410.07170).

    Args:
        shares: For every weight, what its components explain, in falling order.
        budget: Ranks of all weights together.

    Returns:
        The rank of every weight; among equal shares earlier weights come first.

    Example:
        >>> ranks_by_share([torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.4])], 3)
        [1, 2]
    """
    owners = torch.cat([torch.full((len(each),), position) for position, each in enumerate(shares)])
    order = torch.cat([each.cpu() for each in shares]).argsort(descending=True, stable=True)
    return torch.bincount(owners[order[:budget]], minlength=len(shares)).tolist()
