"""Values with room for more coordinates than are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft.weights.sparse_values import SparseValues


class RoomyValues(SparseValues):
    """Adds trained values at no more coordinates than there is room for; which ones may be said late, and anew.

    Values without a coordinate get no gradient but zero, and stay zero. The parameter keeps its shape, so optimizers and DDP
    notice nothing.

    Args:
        size: Elements of the weight.
        room: How many coordinates there can be at most.
        indices: The first ones in the flattened weight, ascending; none by default.
    """

    kind = "roomy_values"

    def __init__(self, size: int, room: int, indices: Tensor | None = None) -> None:
        super().__init__(size, room)
        self.indices = torch.arange(0) if indices is None else indices

    def forward(self, weight: Tensor) -> Tensor:
        # Without a coordinate too: a step of which nothing has a gradient is none.
        added = torch.index_add(weight.flatten(), 0, self.indices, self.values[: len(self.indices)].to(weight.dtype))
        return added.view(weight.shape)

    @torch.no_grad()
    def choose(self, indices: Tensor) -> None:
        """Stand at these coordinates, ascending, all values zero."""
        self.values.zero_()
        self.indices = indices.to(self.values.device)

    def config(self) -> dict[str, Any]:
        return {"size": self.size, "room": len(self.values)}

    def set_extra_state(self, state: Tensor) -> None:
        if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.ndim != 1 or len(state) > len(self.values):
            raise ValueError("the saved coordinates are not whole numbers, or more than there is room for")
        self.check_ascending(state)
        self.indices = state.to(self.values.device).clone()
