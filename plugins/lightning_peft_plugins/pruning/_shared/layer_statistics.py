"""The statistics in scores of weights, besides the weights: sums over gradients and inputs, since masks were last chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_peft.structure.forms import Form, dict_of, fields, tensor, whole
from lightning_peft.weights.shards import spread_as
from lightning_peft.weights.shards import whole as whole_tensor
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
        if quantity in self.sums:  # what was loaded can be on another device, and whole where gradients are shards
            value = spread_as(value, self.sums[quantity].to(value.device)).add_(value)
        self.sums[quantity] = value

    @property
    def ready(self) -> bool:
        """Whether everything was seen at least once."""
        counts = {"x^2": self.samples, "sd": self.calls}
        return all(counts.get(quantity, quantity in self.sums) for quantity in self.quantities)

    def mean(self, quantity: Quantity) -> Tensor:
        """Mean over what was seen: optimizer steps, for inputs samples, for deviations calls."""
        return self.sum(quantity) / max(1, {"x^2": self.samples, "sd": self.calls}.get(quantity, self.steps))

    def sum(self, quantity: Quantity) -> Tensor:
        """The sum over what was seen, whole."""
        found: Tensor = whole_tensor(self.sums[quantity])
        return found

    def reduce(self, strategy: Strategy, weight: Tensor, dim: int) -> None:
        """Sum what each rank saw of its own calls; gradients are the same on all.

        Args:
            strategy: The strategy.
            weight: The weight as layers see it.
            dim: Dimension of its inputs.
        """
        sizes = {"x^2": weight.shape[dim], "sd": weight.shape[1 if dim == 0 else 0]}
        nothing = weight.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))
        # Also what this rank saw nothing of: others did, and wait for it.
        for quantity in sorted(FROM_CALLS & self.quantities):
            own = self.sums.get(quantity, nothing.expand(sizes[quantity])).to(strategy.root_device)
            self.sums[quantity] = strategy.reduce(own.contiguous(), reduce_op="sum")  # type: ignore[assignment]
        if FROM_CALLS & self.quantities:
            counts = torch.tensor([self.samples, self.calls], device=strategy.root_device)
            self.samples, self.calls = strategy.reduce(counts, reduce_op="sum").tolist()  # type: ignore[union-attr]

    def clear(self) -> None:
        """Begin anew."""
        self.sums, self.steps, self.samples, self.calls = {}, 0, 0, 0

    def state(self) -> dict[str, Any]:
        """What was seen of gradients, as plain data."""
        return {"sums": {name: self.sums[name] for name in self.sums if name not in FROM_CALLS}, "steps": self.steps}

    def of_calls(self) -> dict[str, Any]:
        """What this rank saw of its own calls, as plain data."""
        sums = {name: self.sums[name] for name in self.sums if name in FROM_CALLS}
        return {"sums": sums, "samples": self.samples, "calls": self.calls}

    @staticmethod
    def pooled(states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """Make one state of :meth:`of_calls` of several ranks: the first takes what all saw, the others go on with nothing."""
        share, sums = int(rank == 0), {}
        for name in FROM_CALLS & {name for state in states for name in state["sums"]}:
            sums[name] = share * torch.stack([state["sums"][name] for state in states if name in state["sums"]]).sum(0)
        return {"sums": sums, **{key: share * sum(state[key] for state in states) for key in ("samples", "calls")}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` or :meth:`of_calls` gave, beside what was taken back of the other."""
        self.sums |= state["sums"]
        self.steps = int(state.get("steps", self.steps))
        self.samples, self.calls = int(state.get("samples", self.samples)), int(state.get("calls", self.calls))


def statistics_form(quantities: Collection[str], shape: Sequence[int] | None, counts: Sequence[str]) -> Form:
    """What a state of :class:`LayerStatistics` looks like.

    Args:
        quantities: Those that are summed.
        shape: Shape of the weight; ``None`` when that is not known.
        counts: The numbers beside the sums.
    """

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

    return fields({"sums": sums, **dict.fromkeys(counts, whole())})
