"""Pruning by a convex penalty with a pre-defined number of groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.compose.run import Run
from lightning_peft.network.nm_layers import input_dim
from lightning_peft.optim.optimizers import owner
from lightning_peft.weights.choose import keep_largest
from lightning_peft.weights.maps import MappedTensor
from lightning_peft_plugins.pruning.functional.group_envelope import group_envelope_scale
from lightning_peft_plugins.pruning.masked_pruning import MaskedPruning


class GroupEnvelope(MaskedPruning):
    """Lets all but a given number of groups fade while the network trains, then removes them (WGSEF).

    After every optimizer step the weights go through the proximal operator of the groups' sparse envelope, times strength and
    learning rate: the largest groups are shrunk as by weight decay, the others towards zero. At ``end`` those others become
    zero, and the rest trains on. A reconstruction, see the card.

    Args:
        amount: Share of groups to prune, over all targets together.
        strength: Factor of the penalty.
        pattern: What a group is: ``"channel"``, ``"block:RxC"``, ``"head:SIZE"`` or ``"unstructured"``.
        end: When faded groups become zero.
        **kwargs: ``targets``, ``exclude``, ``start`` and ``name`` of
            :class:`~lightning_peft_plugins.pruning.masked_pruning.MaskedPruning`.

    Raises:
        MisconfigurationException: A strength that is not positive, or an N:M pattern.

    Example:
        >>> GroupEnvelope(0.5, strength=0.01)
        GroupEnvelope(amount=0.5, ... strength=0.01, pattern='channel', end='80%', ...)
    """

    paper = "Refael et al., Pruning of neural networks by a weighted group sparse envelope function, 2022, arXiv 2212.12921"

    fixed_arguments = frozenset({"score", "every", "rule", "shape"})

    def __init__(
        self,
        amount: float | None = None,
        *,
        strength: float = 0.01,
        pattern: str = "channel",
        end: int | float | str | None = "80%",
        **kwargs: Any,
    ) -> None:
        super().__init__(amount, "energy", pattern, end=end, every="100%", rule="shrink", shape="constant", **kwargs)
        if self.nm is not None:
            raise MisconfigurationException(f"The envelope frees a number of groups in all, pattern={pattern!r} one in each M.")
        if strength <= 0:
            raise MisconfigurationException(f"strength={strength} must be positive.")
        self.strength = strength

    def keep(self, scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the groups of the largest norm."""
        return keep_largest({name: mean * sizes[name].to(mean) for name, mean in scores.items()}, self.amount)

    def shrinkage(self, run: Run) -> Iterator[tuple[MappedTensor, Tensor]]:
        """Apply the proximal operator, a factor a group, to all targets together."""
        targets = [(mapped, input_dim(mapped.layer), self._rate(run, mapped)) for mapped, _ in self.masks(run.module)]
        targets = [target for target in targets if target[2] > 0]
        norms = [self.grouping.sums(mapped.stored.detach().square(), dim).sqrt() for mapped, dim, _ in targets]
        if not norms:
            return
        flat = torch.cat([values.flatten() for values in norms])
        if not flat.isfinite().all():  # one layer that is NaN would spread to all through what they are compared by
            return
        rates = torch.cat(
            [torch.full_like(values.flatten(), rate) for values, (_, _, rate) in zip(norms, targets, strict=True)]
        )
        free = len(flat) - int(self.amount * len(flat) + 1e-6)
        parts = torch.split(group_envelope_scale(flat, free, self.strength * rates), [values.numel() for values in norms])
        for (mapped, dim, _), values, part in zip(targets, norms, parts, strict=True):
            yield mapped, self.grouping.spread(part.view_as(values), mapped.stored.shape, dim)

    def _rate(self, run: Run, mapped: MappedTensor) -> float:
        """Learning rate of the step a tensor has just taken."""
        place = owner(run.trainer.optimizers, mapped.stored)
        return 0.0 if place is None else float(run.trainer.optimizers[place[0]].param_groups[place[1]]["lr"])
