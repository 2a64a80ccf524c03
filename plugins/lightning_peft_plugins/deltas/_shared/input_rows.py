"""What a layer multiplies with its weight, as rows of a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network.layers import is_conv, is_linear
from lightning_peft.network.plain_class import plain_class


def has_rows(layer: nn.Module) -> bool:
    """Whether :func:`input_rows` knows the layer: linear ones, and convolutions of one group with torch's own forward."""
    if not is_conv(layer):
        return is_linear(layer)
    forward = plain_class(layer).forward
    return layer.groups == 1 and forward in (cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def input_rows(layer: Any, inputs: Tensor) -> Tensor:
    """What the matrix of a layer's weight is multiplied with at every place of the output.

    Of a convolution that is what lies under the kernel, which a kernel finds that picks one number for each of its outputs:
    so stride, dilation and any kind of padding are the layer's own.

    Args:
        layer: One that :func:`has_rows`.
        inputs: What it is called with.

    Returns:
        Shape ``(..., features)``.

    Example:
        >>> layer = nn.Conv1d(1, 5, 2)
        >>> input_rows(layer, torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[[1., 2.],
                 [2., 3.]]])
    """
    if not is_conv(layer):
        return inputs
    one = layer.weight[0]
    picking = torch.eye(one.numel(), dtype=inputs.dtype, device=inputs.device).view(-1, *one.shape)
    return outputs_last(layer, layer._conv_forward(inputs, picking, None))


def outputs_last(layer: nn.Module, output: Tensor) -> Tensor:
    """What a layer returns, or its gradient, with its outputs in the last dimension."""
    return output.movedim(-1 - len(layer.kernel_size), -1) if is_conv(layer) else output  # type: ignore[arg-type]
