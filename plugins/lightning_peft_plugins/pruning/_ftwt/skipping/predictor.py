"""The predictor of a unit: which output channels an input will need, read off the input's channel means."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_peft.arguments import one_of

Normalise: TypeAlias = Literal["softmax", "standard"]
NORMALISE: tuple[str, ...] = get_args(Normalise)


class ChannelPredictor(nn.Module):
    """One linear layer on normalised channel means (Elkerdawy et al., Fire Together Wire Together, CVPR 2022, section 3.1).

    It starts by choosing every channel: its weight is zero and its bias one.

    Args:
        inputs: Number of input channels.
        outputs: Number of channels to choose from.
        normalise: What is done to the means: ``"softmax"``, as the official code does, or ``"standard"``, zero mean and unit
            variance over the channels, whose size does not shrink with their number.

    Raises:
        MisconfigurationException: An unknown ``normalise``.

    Example:
        >>> ChannelPredictor(3, 2)(torch.zeros(1, 3))
        tensor([[1., 1.]], grad_fn=<AddmmBackward0>)
    """

    def __init__(self, inputs: int, outputs: int, normalise: Normalise = "softmax") -> None:
        super().__init__()
        one_of("normalise", normalise, NORMALISE)
        self.normalise = normalise
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.ones(outputs))

    def forward(self, means: Tensor) -> Tensor:
        """Map channel means, shape ``(..., inputs)``, to logits in float32, shape ``(..., outputs)``."""
        with torch.autocast(means.device.type, enabled=False):
            values = normalised(means.float(), self.normalise)
            return nn.functional.linear(values, self.weight.float(), self.bias.float())


def normalised(means: Tensor, normalise: Normalise) -> Tensor:
    """Bring channel means to one scale; see :class:`ChannelPredictor`."""
    return means.softmax(-1) if normalise == "softmax" else nn.functional.layer_norm(means, means.shape[-1:])


def channel_means(inputs: Tensor, *, convolution: bool, tokens: bool) -> Tensor:
    """Average inputs over their positions.

    Args:
        inputs: ``(batch, channels, *places)`` for a convolution, else ``(batch, *places, channels)``.
        convolution: Which of the two it is.
        tokens: Keep the places of the second form apart.

    Returns:
        Shape ``(batch, channels)``, or that of the inputs when places are kept apart.
    """
    if convolution:
        return inputs.mean(tuple(range(2, inputs.ndim)))
    return inputs if tokens or inputs.ndim == 2 else inputs.flatten(1, -2).mean(1)


def chosen(logits: Tensor) -> Tensor:
    """Channels whose probability is above one half; the likeliest one where there is none.

    Args:
        logits: Shape ``(..., channels)``.

    Returns:
        A boolean mask of the same shape with at least one true entry per row.

    Example:
        >>> chosen(torch.tensor([[1.0, -1.0], [-3.0, -2.0]]))
        tensor([[ True, False],
                [False,  True]])
    """
    mask = logits > 0
    best = torch.arange(logits.shape[-1], device=logits.device) == logits.argmax(-1, keepdim=True)
    return mask | (best & ~mask.any(-1, keepdim=True))
