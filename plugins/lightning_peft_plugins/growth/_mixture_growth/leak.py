"""Whether two members are two networks: what one of them computes has no gradient in the weights of the other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor


def check_apart(features: Tensor, dim: int, stored: Mapping[str, Tensor]) -> None:
    """Refuse members that meet before the head, by a backward pass from each.

    Args:
        features: What the head is given, with the graph that made it.
        dim: Its dimension of channels, the first half of which is the first member's.
        stored: Tensors under maps by name; the first half of their rows is the first member's.

    Raises:
        MisconfigurationException: One member's features depend on weights of the other.
    """
    weights = {name: tensor for name, tensor in stored.items() if tensor.requires_grad}
    if not weights or not features.requires_grad:
        return
    found = [name for member in (0, 1) for name in _reached(features, dim, member, weights)]
    if found:
        raise MisconfigurationException(
            f"The network is not two members side by side: half of the channels that the head reads depends on the "
            f"other half of {found[0]}{f' and of {len({*found}) - 1} other layers' if len({*found}) > 1 else ''}. Concatenated "
            "branches (DenseNet, GoogLeNet) and channel shuffles mix the halves. Choose another network, or LayerGrowth."
        )


def _reached(features: Tensor, dim: int, member: int, weights: Mapping[str, Tensor]) -> list[str]:
    """Name the weights of which the other member's half gets a gradient from this member's features."""
    own = features.chunk(2, dim)[member]
    # Weighted: the plain sum of what BatchNorm gives does not depend on what it was given.
    score = (own * torch.linspace(0.5, 1.5, own.numel(), device=own.device, dtype=own.dtype).view(own.shape)).sum()
    gradients = torch.autograd.grad(score, list(weights.values()), retain_graph=True, allow_unused=True)
    return [
        name
        for name, gradient in zip(weights, gradients, strict=True)
        if gradient is not None and bool(gradient.chunk(2)[1 - member].any())
    ]
