"""The statistics in scores of weights, besides the weights: sums over gradients and inputs, since masks were last chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_peft.structure.forms import Form, dict_of, fields, tensor, whole
from lightning_peft_plugins.pruning._shared.deviations import deviation_ratio

Quantity: TypeAlias = Literal["|g|", "g^2", "|wg|", "x^2", "sd"]
FROM_CALLS: frozenset[Quantity] = frozenset({"x^2", "sd"})
"""What is seen when the layer is called; the rest is seen with its gradient."""


class LayerStatistics:
    """Running sums of one layer's weight.

    Args:
        quantities: What is summed: absolute and squared gradients and absolute products of weight and gradient, of the weight's
            shape; squared inputs, one number an input; ``"sd"``, see
            :func:`~lightning_peft_plugins.pruning._shared.deviations.deviation_ratio`, one number an output.

    Attributes:
        sums: The sums so far, float32 or wider; missing before the first observation.
        steps: Optimizer steps seen.
        samples: Samples seen.
        calls: Calls whose deviations were seen.
    """

    def __init__(self, quantities: Iterable[Quantity]) -> None:
        self.quantities = frozenset(quantities)
        self.sums: dict[str, Tensor] = {}
        self.steps = self.samples = self.calls = 0

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
        if "x^2" not in self.quantities:
            return
        values = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
        features = -1 if layer.weight.ndim == 2 else inputs.ndim - layer.weight.ndim + 1  # type: ignore[operator,union-attr]
        self._add("x^2", values.movedim(features, 0).flatten(1).square().sum(1))
        self.samples += len(inputs)

    def see_outputs(self, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        """Take into account what a layer made of what it was given; one sample alone does not vary."""
        if "sd" in self.quantities and len(inputs) > 1:
            self._add("sd", deviation_ratio(layer, inputs, outputs))
            self.calls += 1

    def _add(self, quantity: str, value: Tensor) -> None:
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        # Where a step was not finite nothing was seen; asked without waiting for the device.
        value = torch.where(value.isfinite(), value, 0.0)
        # What was loaded can be on another device.
        self.sums[quantity] = self.sums[quantity].to(value.device).add_(value) if quantity in self.sums else value

    @property
    def ready(self) -> bool:
        """Whether everything was seen at least once."""
        return self.quantities <= self.sums.keys()

    def mean(self, quantity: Quantity) -> Tensor:
        """Mean over what was seen: optimizer steps, for inputs samples, for deviations calls."""
        return self.sums[quantity] / max(1, {"x^2": self.samples, "sd": self.calls}.get(quantity, self.steps))

    def reduce(self, strategy: Strategy) -> None:
        """Sum what each rank saw of its own calls; gradients are the same on all."""
        for quantity in sorted(FROM_CALLS & self.sums.keys()):
            self.sums[quantity] = strategy.reduce(self.sums[quantity].to(strategy.root_device), reduce_op="sum")  # type: ignore[assignment]
        if FROM_CALLS & self.sums.keys():
            counts = torch.tensor([self.samples, self.calls], device=strategy.root_device)
            self.samples, self.calls = strategy.reduce(counts, reduce_op="sum").tolist()  # type: ignore[union-attr]

    def clear(self) -> None:
        """Begin anew."""
        self.sums, self.steps, self.samples, self.calls = {}, 0, 0, 0

    def state(self) -> dict[str, Any]:
        """The sums, as plain data."""
        return {"sums": dict(self.sums), "steps": self.steps, "samples": self.samples, "calls": self.calls}

    @staticmethod
    def pooled(states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """Make one state of those of several ranks: the first takes what all saw of calls, the others go on with none of it."""
        share = int(rank == 0)
        sums = {name: value for name, value in states[0]["sums"].items() if name not in FROM_CALLS}
        for name in FROM_CALLS & {name for state in states for name in state["sums"]}:
            sums[name] = share * torch.stack([state["sums"][name] for state in states if name in state["sums"]]).sum(0)
        counts = {key: share * sum(state[key] for state in states) for key in ("samples", "calls")}
        return {"sums": sums, "steps": states[0]["steps"], **counts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self.sums, self.steps = dict(state["sums"]), int(state["steps"])
        self.samples, self.calls = int(state["samples"]), int(state["calls"])


def statistics_form(quantities: Collection[str], shape: Sequence[int] | None) -> Form:
    """What :meth:`LayerStatistics.state` looks like for a weight of some shape; ``None`` when that is not known."""

    def sums(value: Any, place: str) -> str | None:
        if (found := dict_of(tensor(), quantities, "quantity of this score")(value, place)) is not None:
            return found
        for quantity, item in value.items():
            fits = shape is None or (
                item.ndim == 1 and len(item) in shape[:2] if quantity in FROM_CALLS else list(item.shape) == list(shape)
            )
            if not fits or (item < 0).any():
                return (
                    f"{place}[{quantity!r}] of shape {tuple(item.shape)} is not a sum over a weight of shape "
                    f"{tuple(shape or ())}"
                )
        return None

    return fields({"sums": sums, "steps": whole(), "samples": whole(), "calls": whole()})
