"""Low-rank maps of a frozen sparse weight that keep its zeros."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import Lane, WeightMap
from lightning_peft.network.seeds import named_seed


def mask_lora(weight: Tensor, product: Tensor, scale: float) -> Tensor:
    """Add a low-rank product where a weight is not zero: ``W + s M (B A)`` (MaskLoRA, Zimmer et al. 2023).

    Args:
        weight: Weight of a layer, any shape.
        product: ``B A`` in the weight's shape.
        scale: ``s``; LoRA's ``alpha / rank``.

    Example:
        >>> mask_lora(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 3.0]), 2.0)
        tensor([7., 0.])
    """
    return torch.where(weight == 0, weight, weight + scale * product.to(weight.dtype))


def scale_lora(weight: Tensor, product: Tensor) -> Tensor:
    """Multiply a weight by a low-rank product, ``W (B A)`` by element (ScaleLoRA, Zimmer et al. 2023).

    Example:
        >>> scale_lora(torch.tensor([2.0, 0.0]), torch.tensor([1.5, 1.5]))
        tensor([3., 0.])
    """
    return weight * product.to(weight.dtype)


class _LowRankMap(WeightMap):
    """Holds ``B``, shape ``(first dimension of the weight, rank)``, and ``A``, shape ``(rank, all others)``.

    Args:
        shape: Shape of the weight.
        rank: Columns of ``B``.
        alpha: LoRA's factor, divided by the rank.
        name: Name of the weight, from which and the global seed random values are drawn.
    """

    lane = Lane.DELTA

    def __init__(self, shape: torch.Size | list[int], rank: int, alpha: float, name: str = "") -> None:
        super().__init__()
        self.shape, self.rank, self.alpha = torch.Size(shape), rank, alpha
        self.a = nn.Parameter(torch.empty(rank, self.shape[1:].numel()))
        self.b = nn.Parameter(torch.empty(self.shape[0], rank))
        self.reset(torch.Generator().manual_seed(named_seed(name)))

    def reset(self, generator: torch.Generator) -> None:
        """Set both factors so that the layer computes what it did."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """``B A`` in the weight's shape."""
        return (self.b @ self.a).view(self.shape)

    def config(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "rank": self.rank, "alpha": self.alpha}


class MaskLoRAMap(_LowRankMap):
    """:func:`mask_lora`; ``A`` starts as in LoRA, ``B`` at zero."""

    kind = "mask-lora"

    def reset(self, generator: torch.Generator) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.b)

    def forward(self, weight: Tensor) -> Tensor:
        return mask_lora(weight, self.product(), self.alpha / self.rank)


class ScaleLoRAMap(_LowRankMap):
    """:func:`scale_lora`; all entries start at ``1 / sqrt(rank)``, so that the product is one."""

    kind = "scale-lora"

    def reset(self, generator: torch.Generator) -> None:
        for factor in (self.a, self.b):
            nn.init.constant_(factor, 1 / math.sqrt(self.rank))

    def forward(self, weight: Tensor) -> Tensor:
        return scale_lora(weight, self.product())
