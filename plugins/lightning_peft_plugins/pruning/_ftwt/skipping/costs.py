"""What the layers of a network cost for one sample, and what is left of it when units compute a share of their channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.network.channel_units import ChannelUnit
from lightning_peft.network.layers import has_class, is_conv, is_linear


class LayerCosts:
    """Multiplications and additions of every convolution and linear layer for one sample, seen while it is open.

    Attributes:
        of: Cost by qualified name within the network; a layer that is called several times costs their sum.
    """

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def open(self, network: nn.Module) -> None:
        """Begin to watch the layers of a network."""
        self.of.clear()
        for name, layer in network.named_modules():
            if is_conv(layer) or is_linear(layer):
                self._handles.append(layer.register_forward_hook(self._seer(name)))

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _seer(self, name: str) -> Any:
        def see(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.of[name] = self.of.get(name, 0) + layer_cost(layer, output)

        return see


def layer_cost(layer: nn.Module, output: Tensor) -> int:
    """Operations for one sample of a layer with this output; a multiplication and an addition are two.

    Example:
        >>> layer_cost(nn.Conv2d(3, 8, 3), torch.zeros(2, 8, 5, 5))  # 2 * (8 * 5 * 5) * (3 * 3 * 3)
        10800
        >>> layer_cost(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), torch.zeros(3, 2))  # 2 * 2 * 4
        16
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    per_output = weight.shape[0] if has_class(layer, "Conv1D") else math.prod(weight.shape[1:])
    return 2 * math.prod(output.shape[1:]) * per_output


def share_of_cost(costs: Mapping[str, int], units: Sequence[ChannelUnit], shares: Mapping[str, Tensor]) -> Tensor:
    """Cost of each sample as a share of the dense cost, when units compute a share of their channels.

    A layer costs the share of its outputs times the share of its inputs, as the official code counts; predictors are not
    counted.

    Args:
        costs: Cost by layer.
        units: Units of the network.
        shares: Share of active channels by the unit's producer, shape ``(batch,)``.

    Returns:
        Shape ``(batch,)``.
    """
    factors: dict[str, Tensor] = {}
    for unit in units:
        share = shares.get(unit.producer)
        if share is None:
            continue
        for name in {unit.producer, *unit.chain, *unit.consumers}:
            factors[name] = factors.get(name, torch.ones_like(share)) * share
    dense = sum(costs.values())
    saved = [costs.get(name, 0) * (1.0 - factor) for name, factor in factors.items()]
    return 1.0 - torch.stack(saved).sum(0) / max(dense, 1)


def by_sample(shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring shares of units that see samples in other numbers, as layers that get tokens one by one, to one for each sample.

    Args:
        shares: Share of active channels by unit, shape ``(rows,)``; rows of a sample follow one another.

    Returns:
        Shape ``(samples,)`` each, where the unit with fewest rows counts the samples; a unit that saw none did nothing.

    Example:
        >>> by_sample({"conv": torch.tensor([1.0, 0.5]), "tokens": torch.tensor([0.0, 1.0, 1.0, 1.0])})
        {'conv': tensor([1.0000, 0.5000]), 'tokens': tensor([0.5000, 1.0000])}
    """
    samples = min((len(share) for share in shares.values() if len(share)), default=0)

    def brought(share: Tensor) -> Tensor:
        if len(share) and len(share) % samples == 0:
            return share if len(share) == samples else share.reshape(samples, -1).mean(1)
        return (share.mean() if len(share) else share.new_zeros(())).expand(samples)

    return {name: brought(share) for name, share in shares.items()}
