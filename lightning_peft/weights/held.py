"""A mask that is chosen now and then and holds in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft.weights.hard_mask import mask_factor
from lightning_peft.weights.maps import WeightMap
from lightning_peft.weights.shards import is_shard


class HeldMask(WeightMap):
    """Base of weight maps that keep their mask; it is part of the state dict, but no buffer.

    Attributes:
        held: The mask, ``True`` = kept; empty before the first choice.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held = torch.empty(0, dtype=torch.bool)
        self._factor: Tensor | None = None

    def hold(self, mask: Tensor) -> None:
        """Keep a mask from now on."""
        self._factor = None
        if self.held.shape == mask.shape:
            self.held.copy_(mask)  # the same tensor, so that a compiled step stays valid
        else:
            self.held = mask

    def holds(self, weight: Tensor) -> bool:
        """Whether there is a mask for this weight."""
        return self.held.shape == weight.shape

    def bake(self, weight: Tensor) -> Tensor:
        """Apply the mask for good, whatever is in force; before there is one, what the map is without."""
        return torch.where(self.held, weight, 0.0) if self.holds(weight) else super().bake(weight)

    def factor(self, weight: Tensor) -> Tensor | None:
        """The mask as :func:`~lightning_peft.weights.hard_mask.mask_factor` for this weight, where that is faster."""
        if weight.device.type != "cpu" or torch.compiler.is_compiling() or is_shard(weight):
            return None
        if self._factor is None or self._factor.dtype is not weight.dtype:
            with torch.inference_mode(False):  # a first use in validation must not spoil it for training
                self._factor = mask_factor(self.held, weight.dtype)
        return self._factor

    def get_extra_state(self) -> Tensor:
        return self.held

    def set_extra_state(self, state: Tensor) -> None:
        if not isinstance(state, Tensor) or state.dtype != torch.bool:
            raise ValueError("the saved mask is not a boolean tensor")
        self.held, self._factor = state.to(self.held.device).clone(), None
