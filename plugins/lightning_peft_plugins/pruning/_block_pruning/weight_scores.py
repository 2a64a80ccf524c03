"""Scores of a block that sum over its weights (Kim et al., Shortened LLaMA, 2024, arXiv 2402.02834)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_peft.network.layers import own_parameters


@torch.no_grad()
def magnitude_of(block: nn.Module) -> float:
    """Sum of the absolute weights of a block, as its layers see them; biases and norms do not count.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = nn.init.constant_(layer.weight, -0.5)
        >>> magnitude_of(nn.Sequential(layer, nn.LayerNorm(1)))
        1.0
    """
    return sum(float(weight.abs().sum(dtype=torch.float32)) for weight in _weights(block))


def _weights(block: nn.Module) -> Iterator[Tensor]:
    for layer in block.modules():
        stored = own_parameters(layer).get("weight")
        if stored is not None and stored.ndim > 1:
            yield layer.weight  # type: ignore[misc]


@torch.no_grad()
def taylor_of(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Sum of ``|w g|`` over weights: how much the loss would change without them, to first order.

    ``None`` when none of them has a gradient.

    Example:
        >>> weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
        >>> weight.grad = torch.tensor([[3.0, 0.5]])
        >>> taylor_of([weight])
        tensor(4.)
    """
    seen = [(weight, weight.grad) for weight in parameters if weight.ndim > 1 and weight.grad is not None]
    terms = [(weight * grad).abs().sum(dtype=torch.float32) for weight, grad in seen]
    return torch.stack(terms).sum() if terms else None
