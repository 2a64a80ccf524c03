"""The mathematics of SSF as pure functions: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_and_shift(features: Tensor, scale: Tensor, shift: Tensor | None = None, axis: int = -1) -> Tensor:
    """Scale and shift every channel, ``y = scale * x + shift``.

    Args:
        features: Any shape.
        scale: Shape ``(channels,)``.
        shift: Shape ``(channels,)``; ``None`` for none.
        axis: Dimension of the channels.

    Returns:
        The shape and type of ``features``.

    Example:
        >>> scale_and_shift(torch.ones(1, 2), torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
        tensor([[2., 4.]])
    """
    behind = features.ndim - 1 - axis % features.ndim
    factor = scale.to(features.dtype).view(-1, *(1,) * behind)
    if shift is None:
        return features * factor
    return torch.addcmul(shift.to(features.dtype).view_as(factor), features, factor)


def scaled_weight(weight: Tensor, scale: Tensor, dim: int = 0) -> Tensor:
    """Fold the scale of a layer's outputs into its weight, ``diag(scale) W``.

    Args:
        weight: Weight of a linear layer, a convolution or a normalisation layer.
        scale: Shape ``(outputs,)``.
        dim: Dimension of the weight that counts the outputs.

    Returns:
        The shape and type of ``weight``.

    Example:
        >>> scaled_weight(torch.ones(2, 2), torch.tensor([2.0, 3.0]))
        tensor([[2., 2.],
                [3., 3.]])
    """
    return scale_and_shift(weight.to(torch.promote_types(weight.dtype, scale.dtype)), scale, axis=dim).to(weight.dtype)


def shifted_bias(bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Fold scale and shift of a layer's outputs into its bias, ``scale * b + shift``.

    Example:
        >>> shifted_bias(torch.ones(2), torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
        tensor([2., 4.])
    """
    return (scale * bias + shift).to(bias.dtype)
