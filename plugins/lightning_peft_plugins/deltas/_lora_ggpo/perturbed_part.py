"""Such a product beside a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from lightning_peft.deltas.delta_part import DeltaPart


class PerturbedPart(DeltaPart):
    """Has the random matrix of its form read the inputs too."""

    kind = "perturbed_delta"
    form: Any

    def around(self, call: Callable[..., Any], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output: Tensor = super().around(call, layer, args, kwargs)
        drawn = self.form.drawn()
        if drawn is None:
            return output
        inputs = args[0] if args else next(iter(kwargs.values()))
        return output + linear(inputs, drawn.to(inputs.dtype))
