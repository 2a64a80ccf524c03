"""MSG: masked structural growth (Yao et al., "Masked Structural Growth for 2x Faster Language Model Pre-training", ICLR 2024).

arXiv 2305.02869. New units are random and masked: what they feed is multiplied by a mask that rises from 0 to 1, and
normalisations count a unit by its mask. With the mask at 0 the network computes what it did, whatever its new size and new
weights; at 1 the masks can go. Exact for every network and every target, as long as the masks are in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.structure.axes import resized
from lightning_peft_plugins.growth._layer_growth.net2net import Edit, normal_like, old_mask
from lightning_peft_plugins.growth._layer_growth.used_values import Values, on_used_values


def mask_at(step: int, steps: int) -> float:
    """Mask of new units, linear in the steps since the growth; the official ``grow_time`` is 5000.

    Example:
        >>> [mask_at(step, 4) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    return min(1.0, step / steps) if steps > 0 else 1.0


def masked_layer_norm(x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation whose statistics count every coordinate by its mask, masked.

    Args:
        x: Shape ``(..., width)``.
        mask: In [0, 1], shape ``(width,)``.
        weight: Shape ``(width,)``.
        bias: Shape ``(width,)``.
        eps: Added to the variance.

    Returns:
        Shape of ``x``. With a mask of ones it is ``layer_norm``.

    Example:
        >>> masked_layer_norm(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]), None, None, 0.0)
        tensor([-1., 1., 0.])
    """
    mask = mask.to(x)
    mean = (x * mask).sum(-1, keepdim=True) / mask.sum()
    variance = ((x - mean).square() * mask).sum(-1, keepdim=True) / mask.sum()
    return _affine((x - mean) * (variance + eps).rsqrt(), weight, bias) * mask


def masked_rms_norm(x: Tensor, mask: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS normalisation that counts every coordinate by its mask, masked (the same rule, for a norm the paper does not use).

    Example:
        >>> masked_rms_norm(torch.tensor([2.0, -2.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]), None, 0.0)
        tensor([ 1., -1., 0.])
    """
    mask = mask.to(x)
    square = (x.square() * mask).sum(-1, keepdim=True) / mask.sum()
    return _affine(x * (square + eps).rsqrt(), weight, None) * mask


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@on_used_values
def msg(values: Values, edit: Edit, generator: torch.Generator, *, std: float = 0.02) -> dict[str, Tensor]:
    """Put old weights in their old places and random ones beside them.

    Args:
        values: Old values by qualified name.
        edit: A width edit.
        generator: On the CPU.
        std: Standard deviation of new weights. New factors of norms are 1 and their biases 0; new LayerScale factors are the
            mean of the old.

    Returns:
        New values of the edit's tensors.
    """
    new = {}
    for name, entry in edit["tensors"].items():
        value = resized(values[name], entry["dims"], edit["axes"])
        if entry["role"] == "norm_weight":
            filling = torch.ones_like(value)
        elif entry["role"] == "norm_bias":
            filling = torch.zeros_like(value)
        elif entry["role"] == "scale":
            filling = values[name].mean().expand_as(value)
        else:
            filling = std * normal_like(value, generator)
        new[name] = torch.where(old_mask(value, entry, edit["axes"]), value, filling)
    return new
