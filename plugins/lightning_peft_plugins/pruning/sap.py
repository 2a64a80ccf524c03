"""Pruning by as much as a sparsity index says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.weights.choose import Scope, keep_largest
from lightning_peft_plugins.pruning._masked_pruning.nm_grouping import NMGrouping
from lightning_peft_plugins.pruning.functional.sparsity_index import pq_index, pq_pruned
from lightning_peft_plugins.pruning.masked_pruning import MaskedPruning


class SAP(MaskedPruning):
    """Prunes in every round as many weights as the PQ index of those left says can go (Diao et al., ICLR 2023).

    A round is a training from the first weights, with the masks so far (the lottery ticket): at its end the smallest weights
    go, and the next begins. Rounds end at ``start`` and every ``every`` from there to ``end``; what remains of the training is
    the last round. Give the module a learning-rate schedule that is one round long: it begins anew with each.

    Args:
        p: Smaller order of the index.
        q: Larger order.
        eta: Relative loss of the norm that is tolerated.
        gamma: Factor of the share that goes.
        beta: Largest share that goes in one round.
        scope: What one index is computed of: all weights, each layer's, or each output's.
        start: End of the first round.
        end: Last end of a round.
        every: Length of a round.
        rewind: Step whose weights a round begins with; ``None`` to train on.
        **kwargs: Those of :class:`~lightning_peft_plugins.pruning.masked_pruning.MaskedPruning`.

    Raises:
        MisconfigurationException: Orders that are not ``0 < p < q``, or a pattern of groups.

    Example:
        >>> SAP(start="20%", every="20%", end="80%")
        SAP(p=0.5, q=1.0, ... start='20%', end='80%', every='20%', rewind=0, ...)
    """

    paper = "Diao et al., Pruning Deep Neural Networks from a Sparsity Perspective, ICLR 2023, arXiv 2302.05601"

    def __init__(
        self,
        p: float = 0.5,
        q: float = 1.0,
        *,
        eta: float = 0.0,
        gamma: float = 1.0,
        beta: float = 0.9,
        scope: Scope = "global",
        start: int | float | str = "20%",
        end: int | float | str | None = "80%",
        every: int | float | str = "20%",
        rewind: int | float | str | None = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(scope=scope, start=start, end=end, every=every, rewind=rewind, **kwargs)
        pq_index(torch.ones(1), p, q)
        if not self.grouping.single or isinstance(self.grouping, NMGrouping):
            raise MisconfigurationException(
                f"The PQ index is defined for single weights, not for pattern={kwargs['pattern']!r}."
            )
        self.index = {"p": p, "q": q, "eta": eta, "gamma": gamma, "beta": beta}

    def keep(self, scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Remove from each vector as many as its own index says; what is pruned has a score of minus infinity."""
        if self.scope == "global":
            flat = torch.cat([values.flatten() for values in scores.values()])
            return keep_largest(scores, self._share(flat))
        if self.scope == "layer":
            return {name: keep_largest({name: values}, self._share(values))[name] for name, values in scores.items()}
        rows = {name: values.flatten(1) for name, values in scores.items()}
        return {
            name: torch.stack([keep_largest({"": row}, self._share(row))[""] for row in matrix]).view_as(scores[name])
            for name, matrix in rows.items()
        }

    def _share(self, scores: Tensor) -> float:
        left = scores[scores > -torch.inf]
        return 1 - (left.numel() - pq_pruned(left, **self.index)) / scores.numel()
