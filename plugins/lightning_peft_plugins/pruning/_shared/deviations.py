"""How much a filter changes the spread of what it sees (Homayounfar et al., Beta-Rank, 2023, arXiv 2304.07461)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@torch.no_grad()
def deviation_ratio(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Standard deviation of each output over the batch, over that of all values its filter saw, averaged over places.

    Args:
        layer: A linear layer, or a convolution of one group; padding counts as zeros.
        inputs: What it was given, ``(batch, ..., inputs)`` or ``(batch, inputs, *places)``; two samples or more.
        outputs: What it gave.

    Returns:
        Shape ``(outputs,)``; places at which the inputs do not vary count zero.

    Example:
        >>> layer = nn.Linear(1, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0], [-3.0]]))
        >>> inputs = torch.tensor([[0.0], [2.0]])
        >>> deviation_ratio(layer, inputs, layer(inputs))
        tensor([1., 3.])
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    inputs, outputs = inputs.detach().double(), outputs.detach().double()
    if weight.ndim == 2:
        seen = inputs.flatten(1, -2) if inputs.ndim > 2 else inputs[:, None]
        given = outputs.flatten(1, -2) if outputs.ndim > 2 else outputs[:, None]
        spread, deviation = seen.std((0, 2), correction=0)[:, None], given.std(0, correction=0)
        return _ratio(deviation, spread).mean(0).to(weight.dtype)
    box = inputs.new_ones(1, 1, *weight.shape[2:]) / weight[0, 0].numel()
    moments = torch.stack([inputs.mean((0, 1)), inputs.square().mean((0, 1))])[:, None]
    geometry = (layer.stride, layer.padding, layer.dilation)
    mean, square = _CONVOLVE[weight.ndim](moments, box, None, *geometry)[:, 0]  # type: ignore[operator]
    spread = (square - mean.square()).clamp(min=0.0).sqrt()
    return _ratio(outputs.std(0, correction=0), spread).flatten(1).mean(1).to(weight.dtype)


def _ratio(deviation: Tensor, spread: Tensor) -> Tensor:
    return torch.where(spread > 1e-9, deviation / spread.clamp(min=1e-9), 0.0)
