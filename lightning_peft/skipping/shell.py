"""A layer without its weight."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


class Shell:
    """A layer's own ``forward``, whatever its class makes of it, with another weight."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = copy.copy(layer)
        self.layer.__dict__ = {**layer.__dict__, "_parameters": {}, "weight": None, "bias": None}

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        own = self.layer.__dict__  # a module looks twice at what is set on it
        own["weight"], own["bias"], own["groups"] = weight, bias, groups
        result: Tensor = self.layer.forward(inputs)
        own["weight"] = own["bias"] = None
        return result
