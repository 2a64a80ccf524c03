"""What scores of weights are made of besides the weights: sums over gradients and inputs, since masks were last chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

Quantity: TypeAlias = Literal["|g|", "g^2", "|wg|", "x^2"]


class Statistics:
    """Running sums of one layer's weight.

    Args:
        quantities: What is summed: absolute and squared gradients and absolute products of weight and gradient, of the weight's
            shape; squared inputs, one number an input.

    Attributes:
        sums: The sums so far, float32 or wider; missing before the first observation.
        steps: Optimizer steps seen.
        samples: Samples seen.
    """

    def __init__(self, quantities: Iterable[Quantity]) -> None:
        self.quantities = frozenset(quantities)
        self.sums: dict[str, Tensor] = {}
        self.steps = self.samples = 0

    @torch.no_grad()
    def see_gradient(self, weight: Tensor, grad: Tensor) -> None:
        """Take the gradient of one optimizer step into account."""
        made: dict[str, Callable[[], Tensor]] = {
            "|g|": lambda: grad.abs(),
            "g^2": lambda: grad.square(),
            "|wg|": lambda: (weight * grad).abs(),
        }
        for quantity in made.keys() & self.quantities:
            self._add(quantity, made[quantity]())
        self.steps += 1

    @torch.no_grad()
    def see_inputs(self, layer: nn.Module, inputs: Tensor) -> None:
        """Take what a layer was given into account: channels last for linear layers, second for convolutions."""
        values = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
        features = -1 if layer.weight.ndim == 2 else inputs.ndim - layer.weight.ndim + 1  # type: ignore[operator,union-attr]
        self._add("x^2", values.movedim(features, 0).flatten(1).square().sum(1))
        self.samples += len(inputs)

    def _add(self, quantity: str, value: Tensor) -> None:
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        if quantity in self.sums:
            self.sums[quantity] += value
        else:
            self.sums[quantity] = value

    @property
    def ready(self) -> bool:
        """Whether everything was seen at least once."""
        return self.quantities <= self.sums.keys()

    def mean(self, quantity: Quantity) -> Tensor:
        """Mean over what was seen: optimizer steps, for inputs samples."""
        return self.sums[quantity] / max(1, self.samples if quantity == "x^2" else self.steps)

    def reduce(self, strategy: Strategy) -> None:
        """Sum what each rank saw of its own inputs; gradients are the same on all."""
        if "x^2" in self.sums:
            self.sums["x^2"] = strategy.reduce(self.sums["x^2"], reduce_op="sum")  # type: ignore[assignment]
            self.samples = int(strategy.reduce(torch.tensor(self.samples, device=strategy.root_device), reduce_op="sum"))

    def clear(self) -> None:
        """Begin anew."""
        self.sums, self.steps, self.samples = {}, 0, 0

    def state(self) -> dict[str, Any]:
        """The sums, as plain data."""
        return {"sums": dict(self.sums), "steps": self.steps, "samples": self.samples}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self.sums, self.steps, self.samples = dict(state["sums"]), int(state["steps"]), int(state["samples"])
