"""Adding the gradient of a penalty on a mapped weight, once a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_peft.weights.maps import MappedTensor
from lightning_peft.weights.weight_map import WeightMap


@torch.no_grad()
def add_penalty(mapped: MappedTensor, weight_map: WeightMap, gradient: Callable[[Tensor], Tensor], strength: float) -> None:
    """Add the gradient of a penalty on what enters a weight map to that of the stored value and of the maps below.

    In the map's own backward pass it would be added once for every call of the layer and every accumulated batch, and be
    divided by the factor of a gradient scaler; here, between the backward passes and the step, it is added once.

    Args:
        mapped: The tensor; nothing happens where it has no gradient.
        weight_map: One of its maps.
        gradient: Gradient of the penalty at a value that enters the map.
        strength: Factor of the penalty.
    """
    stored, maps = mapped.stored, mapped.chain.active
    if stored.grad is None:
        return
    below = maps[: maps.index(weight_map)]
    if not below:
        stored.grad.add_(gradient(stored), alpha=strength)
        return
    leaves = [leaf for leaf in (stored, *(p for entry in below for p in entry.parameters())) if leaf.grad is not None]
    with torch.enable_grad():
        value: Tensor = stored
        for entry in below:
            value = entry(value)
        added = torch.autograd.grad(value, leaves, gradient(value.detach()), allow_unused=True)
    for leaf, term in zip(leaves, added, strict=True):
        if term is not None and leaf.grad is not None:
            leaf.grad.add_(term, alpha=strength)
