"""Targets of FTWT's predictors: which channels of a layer's output were active enough to be worth computing."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Criterion: TypeAlias = Literal["mass", "uniform"]
_NEGLIGIBLE = 1e-5


def active_channels(strength: Tensor, keep: float, criterion: Criterion = "mass") -> Tensor:
    """Choose the most active channels of each sample (Elkerdawy et al., CVPR 2022, section 3.2).

    ``"mass"`` keeps the channels that make up ``keep`` of a sample's whole activity, largest first; the one that crosses the
    line is left out, and at 1 every channel with any activity stays. ``"uniform"`` keeps the same share of channels in every
    sample, inactive ones left out.

    The official code masks every channel of a sample whose largest channel alone exceeds ``keep``, and keeps all channels of
    a sample without any activity; here the largest always stays, alone in both cases.

    Args:
        strength: Largest absolute activation of each channel, shape ``(..., channels)``.
        keep: Share of the activity, or of the channels, to keep, in (0, 1].
        criterion: Which of the two.

    Returns:
        A boolean mask of the same shape.

    Example:
        >>> active_channels(torch.tensor([4.0, 3.0, 2.0, 1.0]), 0.7)
        tensor([ True,  True, False, False])
        >>> active_channels(torch.tensor([4.0, 3.0, 2.0, 1.0]), 0.25, "uniform")
        tensor([ True, False, False, False])
    """
    order = strength.argsort(stable=True, dim=-1, descending=True)
    if criterion == "uniform":
        kept = strength.shape[-1] - int((1.0 - keep) * strength.shape[-1])
        wanted = torch.arange(strength.shape[-1], device=strength.device) < kept
        active = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, order, wanted.expand_as(strength))
        active &= strength > _NEGLIGIBLE
    else:
        share = strength.double() / strength.double().sum(-1, keepdim=True).clamp_min(1e-30)
        if keep < 1.0:
            within = share.gather(-1, order).cumsum(-1) <= keep + _NEGLIGIBLE
            active = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, order, within)
        else:
            active = share > _NEGLIGIBLE
    return active.scatter(-1, order[..., :1], True)
