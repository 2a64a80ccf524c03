"""The mathematics of SPT as pure functions: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def sensitive_entries(
    sensitivities: Mapping[str, Tensor], whole: Mapping[str, int], least: Mapping[str, float], budget: int
) -> dict[str, Tensor]:
    """Find the most sensitive entries of several tensors together, as many as a budget can pay for.

    An entry costs one number. A tensor with ``least`` of them or more is tuned in another way, which costs ``whole`` numbers
    however many they are. Entries without any sensitivity are never found.

    Args:
        sensitivities: By tensor, one number for each of its entries, at least 0.
        whole: By tensor, what tuning it in the other way costs, at least ``least``.
        least: By tensor, from how many entries on; infinity for never.
        budget: How many numbers may be trained.

    Returns:
        By tensor, the places of its entries in the flattened tensor, ascending.

    Example:
        >>> seen = {"a": torch.tensor([9.0, 1.0, 5.0]), "b": torch.tensor([7.0, 0.0])}
        >>> sensitive_entries(seen, {"a": 3, "b": 2}, {"a": 3, "b": 2}, 2)
        {'a': tensor([0]), 'b': tensor([0])}
        >>> sensitive_entries(seen, {"a": 3, "b": 2}, {"a": 2, "b": 2}, 3)
        {'a': tensor([0]), 'b': tensor([0])}
        >>> sensitive_entries(seen, {"a": 3, "b": 2}, {"a": 2, "b": 2}, 4)
        {'a': tensor([0, 1, 2]), 'b': tensor([0])}
    """
    names = list(sensitivities)
    sizes = torch.tensor([sensitivities[name].numel() for name in names])
    flat = torch.cat([sensitivities[name].flatten() for name in names]).cpu()
    order = flat.argsort(descending=True, stable=True)[: int(flat.count_nonzero())]
    owners = torch.arange(len(names)).repeat_interleave(sizes)[order]
    price = torch.tensor([whole[name] for name in names])
    enough = torch.tensor([least[name] for name in names])

    def cost(count: int) -> int:
        found = owners[:count].bincount(minlength=len(names))
        return int(torch.where(found >= enough, price, found).sum())

    low, high = 0, len(order)  # the cost never falls with one entry more
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    starts = sizes.cumsum(0) - sizes
    chosen, owned = order[:low], owners[:low]
    return {name: (chosen[owned == place] - starts[place]).sort().values for place, name in enumerate(names)}
