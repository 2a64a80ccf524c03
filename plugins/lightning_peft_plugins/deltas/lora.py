"""LoRA: a product of two thin matrices, added to frozen weights."""

from __future__ import annotations

from lightning_peft_plugins.deltas._shared.low_rank import LowRank


class LoRA(LowRank):
    """LoRA (Hu et al. 2022): trains ``B A`` in ``W + (alpha / rank) B A``; everything that is not named is frozen for the fit.

    See :class:`~lightning_peft_plugins.deltas._shared.low_rank.LowRank` for its arguments.

    Example:
        >>> LoRA(rank=4, tune=("head",))
        LoRA(rank=4, scaling='rank', init='lora', dropout=0.0, tune=('head',), targets='auto', ...)
    """
