"""What becomes of pruned weights: zero at once, or faded until the end of the schedule and zero from then on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft import Run
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.weights.maps import MappedTensor
from lightning_peft.weights.shards import spread_as
from lightning_peft_plugins.pruning._masked_pruning.mask_map import MaskMap
from lightning_peft_plugins.pruning._shared.timeline import PruningTimeline
from lightning_peft_plugins.pruning.functional.decay import pruned_decay

RuleName = Literal["zero", "ste", "shrink", "decay"]
RULES = get_args(RuleName)
Targets = Iterable[tuple[MappedTensor, MaskMap]]


class PruneRule:
    """Pruned weights are zero at once.

    Args:
        regrow: Whether they get the gradient all the same, and may come back at the next choice.

    Attributes:
        masked: Whether layers see pruned weights as zero.
        faded_at: Step after which weights were faded last: a further optimizer of that step fades nothing again.
    """

    def __init__(self, regrow: bool = False) -> None:
        self.masked, self.regrow = True, regrow
        self.faded_at: int | None = None

    def before_step(self, targets: Targets, optimizer: Optimizer, progress: float, scale: float) -> None:
        """Change the gradients of pruned weights, which are ``scale`` too large; ``progress`` is from 0 to 1."""

    def after_step(self, targets: Targets, run: Run, timeline: PruningTimeline) -> None:
        """Change pruned weights after a step."""


class Fading(PruneRule):
    """Pruned weights are seen until the schedule ends, and are zero from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.masked = False

    def after_step(self, targets: Targets, run: Run, timeline: PruningTimeline) -> None:
        self.masked = run.step >= timeline.amounts.end


class Decay(Fading):
    """Pruned weights have a weight decay of their own, which grows as the schedule proceeds (Wang et al., ICLR 2021).

    Args:
        strength: Decay at the end of the schedule.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    @torch.no_grad()
    def before_step(self, targets: Targets, optimizer: Optimizer, progress: float, scale: float) -> None:
        if self.masked:
            return
        moved = trained_by(optimizer)
        for mapped, mask in targets:
            stored = mapped.stored
            if stored in moved and stored.grad is not None and mask.holds(stored):
                held = spread_as(stored, mask.held)
                stored.grad.add_(pruned_decay(stored, held, self.strength * progress * scale))


class Shrink(Fading):
    """Pruned weights are multiplied by a factor after every step.

    Args:
        alpha: The factor.
    """

    def __init__(self, alpha: float = 0.95) -> None:
        super().__init__()
        self.alpha = alpha

    def after_step(self, targets: Targets, run: Run, timeline: PruningTimeline) -> None:
        super().after_step(targets, run, timeline)
        if self.masked or self.faded_at == run.step:
            return
        with torch.no_grad():
            for mapped, factor in self.factors(targets, run):
                mapped.stored.mul_(factor)
        self.faded_at = run.step

    def factors(self, targets: Targets, run: Run) -> Iterator[tuple[MappedTensor, Tensor]]:
        """What targets are multiplied by."""
        for mapped, mask in targets:
            if mask.holds(mapped.stored):
                yield mapped, spread_as(mapped.stored, torch.where(mask.held, 1.0, self.alpha))


def make_rule(name: str, alpha: float, strength: float, *, ends: bool) -> PruneRule:
    """Return the rule called ``name``.

    Args:
        name: One of ``RULES``.
        alpha: Factor of ``"shrink"``.
        strength: Decay of ``"decay"``.
        ends: Whether the schedule has an end.

    Raises:
        MisconfigurationException: A number out of range, or a decay without an end.
    """
    if not 0.0 <= alpha <= 1.0:
        raise MisconfigurationException(f"alpha={alpha} is not a factor on pruned weights, from 0 to 1.")
    if name == "shrink":
        return Shrink(alpha)
    if name != "decay":
        return PruneRule(regrow=name == "ste")
    if not ends or strength <= 0:
        raise MisconfigurationException(
            f'rule="decay" needs a positive strength= (got {strength}) and an end=, at which the weight decay reaches it.'
        )
    return Decay(strength)
