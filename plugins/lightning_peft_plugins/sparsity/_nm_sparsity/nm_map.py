"""The weight map of N:M sparsity."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import Lane, WeightMap
from lightning_peft.weights.functions import transformed
from lightning_peft.weights.held import HeldMask
from lightning_peft.weights.nm import is_nm, nm_mask
from lightning_peft.weights.nm_prune import ste_prune
from lightning_peft.weights.nm_transposable import transposable_nm_mask
from lightning_peft.weights.shards import by_parts, cuts, spread_as
from lightning_peft_plugins.sparsity._nm_sparsity.step_masks import StepMasks


class MaskRule:
    """State shared by all layers of one pattern: N, M, and how strongly pruned weights are held back.

    One object serves many maps, so a step changes one number instead of one per layer. ``decay`` is a 0-dim tensor because a
    compiled step would be compiled again for every new Python number.

    Attributes:
        pulls: Whether pruned weights are pulled to zero before a step by the masks of the forward pass, which are held so long.
        turn: Counts steps: the first forward pass since the last one counts, not those of other weights that a method tries.
        together: Chooses masks of small weights with one another.
    """

    pulls = False

    def __init__(self, n: int, m: int) -> None:
        self.n = n
        self.m = m
        self.turn = 0
        self.dense = True
        self.soft = False
        self.decay = torch.ones(())
        self.together = StepMasks()

    def set(self, n: int, m: int, decay: float) -> None:
        """Enter a phase, or go on in it after a step."""
        self.turn += 1
        self.together.begin()
        self.n, self.m = n, m
        self.dense = decay >= 1.0
        self.soft = 0.0 < decay < 1.0
        self.decay.fill_(decay)


def _trains(weight: Tensor) -> bool:
    """Whether a forward pass with this weight is one of the training's, run as Python: what it makes means something later."""
    return not transformed() and weight.requires_grad and torch.is_grad_enabled()


class NMMap(WeightMap):
    """Keeps the N largest of every M consecutive weights along the input dimension; chosen anew from every weight it is given.

    Args:
        n: Weights kept.
        m: Group size.
        dim: Input dimension of the weight.
        across: Output dimension, for a mask that is N:M along both; ``None`` for one along the inputs alone.
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
        across: int | None = None,
    ) -> None:
        super().__init__()
        self.n, self.m, self.dim, self.across = n, m, dim, across
        self.masked_grad = masked_grad
        if rule is None:
            rule = MaskRule(n, m)
            rule.set(n, m, 0.0)
        self.rule = rule
        self._of_forward: tuple[int, Tensor | None] = (0, None)

    def config(self) -> dict[str, Any]:
        sides = {"dim": self.dim} if self.across is None else {"dim": self.dim, "across": self.across}
        return {"n": self.n, "m": self.m, **sides}

    def mask(self, weight: Tensor) -> Tensor:
        """Return the mask in force for a weight."""
        return by_parts(self.chosen, weight.detach(), self.rule.n, self.rule.m)  # type: ignore[no-any-return]

    def mask_of_step(self, weight: nn.Parameter) -> Tensor:
        """Return the same for a parameter in a training step, where it may be chosen with those of other layers."""
        found = self.rule.together.take(weight, self.rule.n, self.rule.m, self.dim) if self.across is None else None
        return self.mask(weight) if found is None else found

    def chosen(self, weight: Tensor, n: int, m: int) -> Tensor:
        """Choose a mask of a pattern."""
        if self.across is None:
            return nm_mask(weight, n, m, self.dim)
        return transposable_nm_mask(weight, n, m, self.dim, self.across)

    def splits(self, weight: Tensor) -> bool:
        """So it can where no group has members in two processes."""
        grouped = (self.dim, *(() if self.across is None else (self.across,)))
        return not any(cuts(weight, dim, m) for dim in grouped for m in (self.m, self.rule.m))

    def forward(self, weight: Tensor) -> Tensor:
        rule = self.rule
        if rule.dense:
            return weight
        trains = _trains(weight)
        mask = self.mask_of_step(weight) if trains and type(weight) is nn.Parameter else self.mask(weight)
        # A compiled step must not read a number that changes with every step: it would be compiled again for it.
        if rule.pulls and trains and type(mask) is Tensor and self._of_forward[0] != rule.turn:
            self._of_forward = (rule.turn, mask)
        decay = rule.decay if rule.soft else 0.0
        return by_parts(partial(ste_prune, masked_grad=self.masked_grad), weight, mask, decay)  # type: ignore[no-any-return]

    def take_mask(self, weight: Tensor) -> Tensor:
        """Return the mask of this step's forward pass, once; choose one where none was kept."""
        turn, mask = self._of_forward
        self._of_forward = (turn, None)
        if mask is None or turn != self.rule.turn or (mask.shape, mask.device) != (weight.shape, weight.device):
            return self.mask(weight)
        return mask

    def bake(self, weight: Tensor) -> Tensor:
        """Apply the target pattern, whatever the phase."""
        return torch.where(self.chosen(weight, self.n, self.m), weight, 0.0)

    def extra_repr(self) -> str:
        return f"{self.n}:{self.m}, dim={self.dim}" + ("" if self.across is None else f", across={self.across}")


class HeldNMMap(HeldMask, NMMap):
    """An :class:`NMMap` that keeps its mask between refreshes; before there is one, it is chosen from every weight."""

    kind = "nm-held"

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Choose the mask anew."""
        self.hold(self.chosen(weight, self.rule.n, self.rule.m))

    def mask(self, weight: Tensor) -> Tensor:
        return spread_as(weight, self.held) if self.holds(weight) else super().mask(weight)

    mask_of_step = mask

    def bake(self, weight: Tensor) -> Tensor:
        """Apply the mask for good where it has the target pattern; on the way there it is wider."""
        target = self.holds(weight) and self._has_target_pattern()
        return super().bake(weight) if target else NMMap.bake(self, weight)

    def _has_target_pattern(self) -> bool:
        held = self.held.to(torch.float32)
        along = is_nm(held, self.n, self.m, self.dim)
        if not along or self.across is None:
            return along
        whole = held.narrow(self.dim, 0, held.shape[self.dim] // self.m * self.m)  # what fills no group is dense
        return is_nm(whole, self.n, self.m, self.across)
