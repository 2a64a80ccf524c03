"""A layer without its weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Shell:
    """A layer's own ``forward``, whatever its class makes of it, with another weight.

    Each call has an object of its own, so that calls of several threads do not see each other's weights.

    Args:
        layer: A layer whose parameters are a weight and a bias, and that has no hooks; see :func:`why_whole`.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.kind: Any = type(layer)
        self.settings = {**layer.__dict__, "_parameters": {}, "weight": None, "bias": None}

    @property
    def layer(self) -> Any:
        """A layer that has all but a weight."""
        return self._layer(self.settings)

    def _layer(self, attributes: dict[str, Any]) -> Any:
        layer = object.__new__(self.kind)
        layer.__dict__ = attributes
        return layer

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        result: Tensor = self._layer({**self.settings, "weight": weight, "bias": bias, "groups": groups}).forward(inputs)
        return result


def why_whole(layer: nn.Module) -> str:
    """Why a layer cannot compute with a part of its weight; empty where it can.

    Example:
        >>> why_whole(nn.Linear(2, 1))
        ''
        >>> why_whole(nn.LSTM(2, 1))
        'LSTM has more than a weight and a bias: bias_hh_l0'
    """
    own = [*layer._parameters, *layer._buffers, *layer._modules]
    others = sorted(set(own) - {"weight", "bias"})
    if others:
        return f"{type(layer).__name__} has more than a weight and a bias: {others[0]}"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return f"{type(layer).__name__} has hooks"
    return ""
