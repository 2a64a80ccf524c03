"""Pruning by weights and activations."""

from __future__ import annotations

from typing import Any

from lightning_peft.contract import SHARDED
from lightning_peft.weights.choose import Scope
from lightning_peft_plugins.pruning.masked_pruning import MaskedPruning


class Wanda(MaskedPruning):
    """Prunes in each output the weights of the smallest magnitude times norm of their input (Sun et al., ICLR 2024).

    The official code prunes a trained network layer by layer, each on what the pruned layers before it give. Here all layers
    are ranked at once, on batches of the training, which then goes on with the masks.

    Args:
        amount: Share of each output's weights to prune; not with an N:M pattern, which says it.
        score: What ranks weights.
        scope: What is ranked together.
        **kwargs: Those of :class:`~lightning_peft_plugins.pruning.masked_pruning.MaskedPruning`.

    Example:
        >>> Wanda(pattern="2:4", every=32)
        Wanda(score='wanda', pattern='2:4', ... scope='row', ... every=32, ...)
    """

    strategies = SHARDED
    paper = "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, arXiv 2306.11695"

    def __init__(self, amount: float | None = None, score: str = "wanda", *, scope: Scope = "row", **kwargs: Any) -> None:
        super().__init__(amount, score, scope=scope, **kwargs)
