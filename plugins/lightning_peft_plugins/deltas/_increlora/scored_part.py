"""A product beside a linear layer whose gradient is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_peft.capture.look import GradientLook
from lightning_peft.deltas.form import Form
from lightning_peft_plugins.deltas._shared.blocks_part import BlocksPart


class ScoredPart(BlocksPart):
    """Shows its form the gradient for the product, which nothing else here computes: that of the outputs times the inputs."""

    def __init__(self, form: Form | Mapping[str, Any], dropout: float = 0.0) -> None:
        super().__init__(form, dropout)
        self._look = GradientLook(self._see)

    def around(self, call: Callable[..., Any], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output: Tensor = super().around(call, layer, args, kwargs)
        if not self.form.watched:
            return output
        return self._look(output, args[0] if args else next(iter(kwargs.values())), *self.form.factors())

    def _see(self, gradient: Tensor, inputs: Tensor, down: Tensor, up: Tensor) -> None:
        flat = gradient.flatten(0, -2)
        self.form.see(flat.T @ inputs.flatten(0, -2).to(flat.dtype), down, up)
