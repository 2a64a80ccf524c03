"""Pruning by a convex penalty with a pre-defined number of groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.arguments import positive
from lightning_peft.weights.choose import keep_largest
from lightning_peft_plugins.pruning._group_envelope.envelope_shrink import EnvelopeShrink
from lightning_peft_plugins.pruning._masked_pruning.nm_grouping import NMGrouping
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
        if isinstance(self.grouping, NMGrouping):
            raise MisconfigurationException(
                f"The envelope chooses among all groups, pattern={pattern!r} within each M. Use another pattern."
            )
        positive("strength", strength)
        self.rule = EnvelopeShrink(self.grouping, self.amount, strength)

    def keep(self, scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the groups of the largest norm."""
        return keep_largest({name: mean * sizes[name].to(mean) for name, mean in scores.items()}, self.amount)
