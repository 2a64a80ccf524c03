"""CMF: a Kalman filter refines the source, and the network is drawn to that."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_peft_plugins.test_time._shared.descent import fine_copy
from lightning_peft_plugins.test_time.functional.cmf import filter_gain
from lightning_peft_plugins.test_time.roid import ROID

NORM_PARAMETERS = 38_400
"""Of the norm layers of a ViT-B/16, for which the official code gives the process noise."""


class CMF(ROID):
    """ROID whose network is not drawn to the source itself, but to a refined source that follows the stream.

    A hidden model decays towards the source and takes in some of the network after every step, as much as a Kalman filter finds
    right; then the network moves a little towards the hidden model. Loss, weights and corrected prior are those of
    :class:`ROID`.

    Args:
        decay: Share of the hidden model that stays when it decays towards the source (alpha).
        target_momentum: Share of the adapted parameters that stays after every step (gamma).
        noise: Process noise of the filter for 38,400 parameters that move, the norm layers of a ViT-B/16; otherwise in
            proportion.
        kwargs: Arguments of :class:`ROID`.

    Example:
        >>> CMF(noise=0.01).decay
        0.99
    """

    paper = (
        "Lee, Chang: Continual Momentum Filtering on Parameter Space for Online Test-time Adaptation, ICLR 2024, "
        "https://openreview.net/forum?id=BllUWdpIOA"
    )
    fixed_arguments: ClassVar[frozenset[str]] = frozenset({"source_momentum"})

    def __init__(self, *, decay: float = 0.99, target_momentum: float = 0.99, noise: float = 0.005, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.decay, self.target_momentum, self.noise = decay, target_momentum, noise
        self.hidden: dict[str, Tensor] = {}

    @torch.no_grad()
    def ensemble(self) -> None:
        noise = self.noise * sum(p.numel() for p in self.parameters.values()) / NORM_PARAMETERS
        share, self._variance = filter_gain(self._variance, noise, self.decay)
        for name, parameter in self.parameters.items():
            hidden = self.hidden[name]
            hidden.lerp_(self.source[name].to(hidden.dtype), 1 - self.decay)
            hidden.lerp_(parameter.to(hidden.dtype), 1 - share)
            parameter.copy_(torch.lerp(parameter.to(hidden.dtype), hidden, 1 - self.target_momentum))

    def forget(self) -> None:
        self.hidden, self._variance = fine_copy(self.source), 0.0
        super().forget()

    def release(self) -> None:
        super().release()
        self.hidden = {}
