"""The weight map of N:M sparsity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft import Lane, WeightMap
from lightning_peft.weights.held import HeldMask
from lightning_peft.weights.nm import is_nm, nm_mask
from lightning_peft.weights.nm_prune import ste_prune


class MaskRule:
    """State shared by all layers of one pattern: N, M, and how strongly pruned weights are held back.

    One object serves many maps, so a step changes one number instead of one per layer. ``decay`` is a 0-dim tensor because a
    compiled step would be compiled again for every new Python number.
    """

    def __init__(self, n: int, m: int) -> None:
        self.n = n
        self.m = m
        self.dense = True
        self.soft = False
        self.decay = torch.ones(())

    def set(self, n: int, m: int, decay: float) -> None:
        """Enter a phase."""
        self.n, self.m = n, m
        self.dense = decay >= 1.0
        self.soft = 0.0 < decay < 1.0
        self.decay.fill_(decay)


class NMMap(WeightMap):
    """Keeps the N largest of every M consecutive weights along the input dimension; chosen anew from every weight it is given.

    Args:
        n: Weights kept.
        m: Group size.
        dim: Input dimension of the weight.
        masked_grad: Whether pruned weights receive the decayed gradient only, instead of the full one (STE).
        rule: What is in force at the moment; a map on its own (baking from a file) is binary N:M.
    """

    kind = "nm"
    lane = Lane.MASK

    def __init__(
        self,
        n: int,
        m: int,
        dim: int,
        masked_grad: bool = False,
        rule: MaskRule | None = None,
    ) -> None:
        super().__init__()
        self.n, self.m, self.dim = n, m, dim
        self.masked_grad = masked_grad
        if rule is None:
            rule = MaskRule(n, m)
            rule.set(n, m, 0.0)
        self.rule = rule

    def config(self) -> dict[str, Any]:
        return {"n": self.n, "m": self.m, "dim": self.dim}

    def mask(self, weight: Tensor) -> Tensor:
        """Return the mask in force for a weight."""
        return nm_mask(weight.detach(), self.rule.n, self.rule.m, self.dim)

    def forward(self, weight: Tensor) -> Tensor:
        rule = self.rule
        if rule.dense:
            return weight
        decay = rule.decay if rule.soft else 0.0
        return ste_prune(weight, self.mask(weight), decay, masked_grad=self.masked_grad)

    def bake(self, weight: Tensor) -> Tensor:
        """Apply the target pattern, whatever the phase."""
        return torch.where(nm_mask(weight, self.n, self.m, self.dim), weight, 0.0)

    def extra_repr(self) -> str:
        return f"{self.n}:{self.m}, dim={self.dim}"


class HeldNMMap(HeldMask, NMMap):
    """An :class:`NMMap` that keeps its mask between refreshes; before there is one, it is chosen from every weight."""

    kind = "nm-held"

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Choose the mask anew."""
        self.hold(nm_mask(weight, self.rule.n, self.rule.m, self.dim))

    def mask(self, weight: Tensor) -> Tensor:
        return self.held if self.holds(weight) else super().mask(weight)

    def bake(self, weight: Tensor) -> Tensor:
        """Apply the mask for good where it has the target pattern; on the way there it is wider."""
        target = self.holds(weight) and is_nm(self.held.to(weight.dtype), self.n, self.m, self.dim)
        return super().bake(weight) if target else NMMap.bake(self, weight)
