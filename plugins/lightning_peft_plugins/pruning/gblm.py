"""Pruning by weights, activations and gradients."""

from __future__ import annotations

from typing import Any

from lightning_peft.contract import SHARDED
from lightning_peft.weights.choose import Scope
from lightning_peft_plugins.pruning.masked_pruning import MaskedPruning


class GBLM(MaskedPruning):
    """Prunes in each output by :class:`~lightning_peft_plugins.pruning.wanda.Wanda`'s score plus magnitude times gradient.

    The score is ``|W| (||X|| + 100 ||G||)``, with ``||G||`` the Euclidean norm of the weight's gradients over ``every`` steps
    (Das et al. 2023, official code): it grows with their number, as published. That code takes gradients of 128 single
    sequences in a pass of its own; here they are those of the training's steps.

    Args:
        amount: Share of each output's weights to prune; not with an N:M pattern, which says it.
        score: What ranks weights.
        scope: What is ranked together.
        **kwargs: Those of :class:`~lightning_peft_plugins.pruning.masked_pruning.MaskedPruning`.

    Example:
        >>> GBLM(0.5, every=128)
        GBLM(amount=0.5, score='gblm', ... scope='row', ... every=128, ...)
    """

    strategies = SHARDED
    paper = "Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models, 2023, arXiv 2311.04902"

    def __init__(self, amount: float | None = None, score: str = "gblm", *, scope: Scope = "row", **kwargs: Any) -> None:
        super().__init__(amount, score, scope=scope, **kwargs)
