"""Iterative soft shrinkage."""

from __future__ import annotations

from typing import Any

from lightning_peft.compose.schedule import Shape
from lightning_peft.weights.choose import Scope
from lightning_peft_plugins.pruning._masked_pruning.rules import RuleName
from lightning_peft_plugins.pruning.masked_pruning import MaskedPruning


class ISSP(MaskedPruning):
    """Shrinks the smallest weights of each layer a little after every step instead of cutting them off (ISS-P).

    Which weights those are is decided anew in every step, so a weight that was shrunk by mistake grows back. At ``end`` the
    smallest are set to zero for good, and the rest trains on.

    Args:
        amount: Share of each layer's weights to prune.
        alpha: What pruned weights are multiplied by after a step; 0 is iterative hard thresholding.
        end: When pruned weights become zero.
        every: Length between choices.
        scope: What is ranked together.
        shape: How the amount grows until ``end``.
        rule: What becomes of what is pruned.
        **kwargs: Those of :class:`~lightning_peft_plugins.pruning.masked_pruning.MaskedPruning`.

    Example:
        >>> ISSP(0.9, end="60%")
        ISSP(amount=0.9, ... alpha=0.95, end='60%', ...)
    """

    paper = "Wang et al., Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution, ICCV 2023, arXiv 2303.09650"

    def __init__(
        self,
        amount: float | None = None,
        *,
        alpha: float = 0.95,
        end: int | float | str | None = "50%",
        every: int | float | str = 1,
        scope: Scope = "layer",
        shape: Shape = "constant",
        rule: RuleName = "shrink",
        **kwargs: Any,
    ) -> None:
        super().__init__(amount, alpha=alpha, end=end, every=every, scope=scope, shape=shape, rule=rule, **kwargs)
