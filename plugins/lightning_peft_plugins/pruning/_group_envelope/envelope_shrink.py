"""The proximal operator of the groups' sparse envelope after every step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_peft import Run
from lightning_peft.network.nm_layers import input_dim
from lightning_peft.optim.optimizers import owner
from lightning_peft.weights.groups import Grouping
from lightning_peft.weights.maps import MappedTensor
from lightning_peft.weights.shards import spread_as, whole
from lightning_peft_plugins.pruning._masked_pruning.rules import Shrink, Targets
from lightning_peft_plugins.pruning.functional.group_envelope import group_envelope_scale


class EnvelopeShrink(Shrink):
    """Shrinks the largest groups as weight decay would, and the others towards zero (Refael et al., 2022).

    Args:
        grouping: What a group is.
        amount: Share of the groups that fades.
        strength: Factor of the penalty.
    """

    def __init__(self, grouping: Grouping, amount: float, strength: float) -> None:
        super().__init__()
        self.grouping, self.amount, self.strength = grouping, amount, strength

    def factors(self, targets: Targets, run: Run) -> Iterator[tuple[MappedTensor, Tensor]]:
        """Apply the operator, a factor a group, to all targets together; pruned or not."""
        moved = [(mapped, input_dim(mapped.layer), _rate(run, mapped)) for mapped, _ in targets]
        moved = [target for target in moved if target[2] > 0]
        norms = [self.grouping.sums(whole(mapped.stored.detach()).square(), dim).sqrt() for mapped, dim, _ in moved]
        if not norms:
            return
        flat = torch.cat([values.flatten() for values in norms])
        if not flat.isfinite().all():  # one layer that is NaN would spread to all through what they are compared by
            return
        rates = torch.cat([torch.full_like(values.flatten(), rate) for values, (_, _, rate) in zip(norms, moved, strict=True)])
        free = len(flat) - int(self.amount * len(flat) + 1e-6)
        parts = torch.split(group_envelope_scale(flat, free, self.strength * rates), [values.numel() for values in norms])
        for (mapped, dim, _), values, part in zip(moved, norms, parts, strict=True):
            factor = self.grouping.spread(part.view_as(values), mapped.stored.shape, dim)
            yield mapped, spread_as(mapped.stored, factor)


def _rate(run: Run, mapped: MappedTensor) -> float:
    """Learning rate of the step a tensor has just taken."""
    place = owner(run.trainer.optimizers, mapped.stored)
    return 0.0 if place is None else float(run.trainer.optimizers[place[0]].param_groups[place[1]]["lr"])
