"""Gradual magnitude pruning."""

from __future__ import annotations

from typing import Any

from lightning_peft_plugins.pruning.masked_pruning import MaskedPruning


class MagnitudePruning(MaskedPruning):
    """Prunes the smallest weights, more and more of them, while the network trains (Zhu & Gupta 2017).

    The amount follows ``s (1 - (1 - p)^3)`` from ``start`` to ``end`` (equation 1). Weights of all layers are ranked together;
    in the paper those of each layer are, ``scope="layer"``.

    Args:
        amount: Share of the targets' weights to prune; not with an N:M pattern, which says it.
        start: First choice: steps, ``"25%"`` or ``"3ep"``.
        end: Last choice, with the whole amount; ``None`` for one choice only.
        **kwargs: Those of :class:`~lightning_peft_plugins.pruning.masked_pruning.MaskedPruning`.

    Example:
        >>> MagnitudePruning(0.9, end="75%")
        MagnitudePruning(amount=0.9, ... start=0, end='75%', ...)
    """

    def __init__(
        self, amount: float | None = None, *, start: int | float | str = 0, end: int | float | str | None = "50%", **kwargs: Any
    ) -> None:
        super().__init__(amount, start=start, end=end, **kwargs)
