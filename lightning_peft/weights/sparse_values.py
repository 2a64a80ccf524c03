"""Values that a weight gains at some of its coordinates, which alone are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.compose.lanes import Lane
from lightning_peft.weights.shards import opened
from lightning_peft.weights.weight_map import WeightMap


class SparseValues(WeightMap):
    """Adds trained values to a frozen weight at chosen coordinates; their gradient is that of the weight there.

    So an optimizer keeps state for the chosen coordinates alone. Averages of the module do not follow the coordinates: whoever
    moves them moves those of every copy (:meth:`move`).

    Args:
        size: Elements of the weight.
        indices: The coordinates in the flattened weight, ascending, or how many of them there are.

    Attributes:
        values: What is added, in single precision beside weights of half precision.
        indices: Where; part of the state dict, but no buffer.
    """

    kind = "sparse_values"
    lane = Lane.DELTA

    def __init__(self, size: int, indices: Tensor | int) -> None:
        super().__init__()
        self.size = size
        self.indices = torch.arange(indices) if isinstance(indices, int) else indices
        self.values = nn.Parameter(torch.zeros(len(self.indices)))

    def forward(self, weight: Tensor) -> Tensor:
        added = torch.index_add(weight.flatten(), 0, self.indices, self.values.to(weight.dtype))
        return added.view(weight.shape)

    @torch.no_grad()
    def move(self, indices: Tensor) -> None:
        """Stand at as many other coordinates, ascending; values of those that stay come along, the others begin at zero."""
        indices = indices.to(self.indices.device)
        with opened(self.values) as full:
            full.copy_(carried(full, self.indices, indices))
        self.indices = indices

    def config(self) -> dict[str, Any]:
        return {"size": self.size, "indices": len(self.indices)}

    def get_extra_state(self) -> Tensor:
        return self.indices

    def set_extra_state(self, state: Tensor) -> None:
        if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != self.values.shape:
            raise ValueError("the saved coordinates are not as many whole numbers as there are values")
        self.check_ascending(state)
        self.indices = state.to(self.indices.device).clone()

    def check_ascending(self, state: Tensor) -> None:
        """Refuse saved coordinates that do not ascend within the weight."""
        inside = len(state) == 0 or (int(state[0]) >= 0 and int(state[-1]) < self.size)
        if not inside or not bool((state[1:] > state[:-1]).all()):
            raise ValueError("the saved coordinates do not ascend within the weight")


def carried(tensor: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return what belongs to new coordinates: what is known of those that were among the old ones, and zeros.

    Args:
        tensor: One number for each old coordinate.
        old: The old coordinates, ascending.
        new: The new ones, ascending.

    Example:
        >>> carried(torch.tensor([1.0, 2.0]), torch.tensor([3, 5]), torch.tensor([5, 6, 7]))
        tensor([2., 0., 0.])
    """
    found = torch.zeros(len(new), dtype=tensor.dtype, device=tensor.device)
    places = torch.searchsorted(new, old).clamp(max=max(0, len(new) - 1))
    stays = new[places] == old
    found[places[stays]] = tensor[stays]
    return found
