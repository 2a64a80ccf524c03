"""Deltas whose first values are found in the first batches of a training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Resource, Run
from lightning_peft.arguments import positive
from lightning_peft.capture.layer_calls import LayerCalls
from lightning_peft.contract import SHARDED
from lightning_peft.deltas.sides import Place
from lightning_peft.network.layers import is_linear
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.structure.forms import Form as StateForm
from lightning_peft.structure.forms import dict_of, fields, tensor
from lightning_peft.weights.shards import gathered, whole
from lightning_peft_plugins.deltas._shared.scaled_delta import ScaledDelta


class BatchStart(ScaledDelta):
    """A delta that trains from the step after ``looks`` steps, in which its layers are watched; subclasses say for what.

    Until then a delta adds nothing and gets no gradient, while everything else that is trained goes on. What is watched is
    added up over all processes, and is in checkpoints until it was used. Layers that are not linear start as in LoRA, and the
    plan says how many.

    Args:
        rank: Rank of the deltas.
        alpha: Numerator of the scale.
        looks: Optimizer steps to watch.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Raises:
        MisconfigurationException: Also in a training with a gradient scaler, which wants a gradient in every step.
    """

    strategies = SHARDED  # of inputs of a layer that is split, a process sees a part, or what others see too
    writes = frozenset({Resource.DELTA, Resource.GRADIENT})

    def __init__(self, rank: int = 8, alpha: float | None = None, looks: int = 8, **kwargs: Any) -> None:
        super().__init__(rank, alpha, **kwargs)
        positive("looks", looks)
        self.looks = looks
        self.seen: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}
        self._calls = LayerCalls()
        self._kept: set[str] = set()
        self._watched: dict[str, Place] = {}

    @staticmethod
    def watches(place: Place) -> bool:
        """Whether first values are found for a tensor."""
        return place.called and is_linear(place.layer)

    def see(self, name: str, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Take notice of one call of a layer, by :meth:`add`."""
        raise NotImplementedError

    def begin_with(self, form: Any, weight: Tensor, seen: Tensor, rate: float) -> None:
        """Give a form its first values.

        Args:
            form: The form.
            weight: The frozen weight, as a matrix.
            seen: What was added up for it.
            rate: The learning rate that it is trained with next.
        """
        raise NotImplementedError

    def begun(self, forms: Mapping[str, Any]) -> None:
        """Look over the forms that have their first values, by tensor, with :attr:`seen` for the last time."""

    def add(self, name: str, value: Tensor) -> None:
        """Add to what was seen of a layer in this step."""
        self._new[name] = value if name not in self._new else self._new[name] + value

    def attach(self, module: LightningModule) -> None:
        self._kept = {name for name, _ in self.forms(module)}
        super().attach(module)

    def start(self, run: Run) -> None:
        """Watch the layers, unless that is done or the deltas come from an earlier training.

        Raises:
            MisconfigurationException: A gradient scaler is in use.
        """
        self._watched = {
            place.tensor: place for place in self.places(run.module) if place.tensor not in self._kept and self.watches(place)
        }
        if run.step >= self.looks or not self._watched:
            return
        if run.gradient_scaler is not None:
            raise MisconfigurationException(
                f"{self.name} trains no delta in its first {self.looks} steps, and the gradient scaler of 16-mixed wants a "
                "gradient in every step. Train with precision='bf16-mixed'."
            )
        self._watch({name: place.layer for name, place in self._watched.items()})

    def _watch(self, layers: Mapping[str, nn.Module]) -> None:
        self._calls.open(layers, self._see)

    def _see(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if self.in_training_step():
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                self.see(name, layer, inputs, output)

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Let no gradient reach the deltas while their layers are watched."""
        if run.step < self.looks and self._watched:
            moved = trained_by(optimizer)
            for _, form in self.watched_forms(run.module):
                for parameter in form.parameters():
                    if parameter in moved:
                        parameter.grad = None

    def after_step(self, run: Run) -> None:
        """Add up what all processes saw; once that is enough, give the deltas their first values."""
        for name, value in self._new.items():
            everywhere: Any = run.trainer.strategy.reduce(value, reduce_op="sum")
            # What was loaded can be on another device.
            self.seen[name] = self.seen[name].to(everywhere.device) + everywhere if name in self.seen else everywhere
        self._new = {}
        if run.step < self.looks or not self.seen:
            return
        self._calls.close()
        rates = [float(group["lr"]) for optimizer in run.trainer.optimizers for group in optimizer.param_groups]
        forms = {name: form for name, form in self.watched_forms(run.module) if name in self.seen}
        with torch.no_grad():
            for name, form in forms.items():
                place, seen = self._watched[name], self.seen[name]
                with gathered(form):
                    self.begin_with(form, place.layout.matrix(whole(place.seen.detach())).to(seen.dtype), seen, min(rates))
            with gathered(*forms.values()):
                self.begun(forms)
        self.seen = {}

    def watched_forms(self, module: nn.Module) -> list[tuple[str, Any]]:
        """The forms whose first values are found."""
        return [(name, form) for name, form in self.forms(module) if name in self._watched]

    def awaited(self, run: Run) -> Iterable[str]:
        """The deltas, where the training ended before they began to learn."""
        return [f"step {self.looks + 1}, from which it trains"] if self._watched and run.step <= self.looks else []

    def finish(self, run: Run) -> None:
        """Stop watching."""
        self._calls.close()

    def describe(self, module: nn.Module) -> str:
        found = self.places(module)
        others = len(found) - sum(map(self.watches, found))
        said = f", {others} of them begin as in LoRA" if others else ""
        return f"{super().describe(module)}, trained from step {self.looks + 1}{said}"

    def state(self) -> dict[str, Any]:
        return {"seen": dict(self.seen)}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> StateForm:
        return fields({"seen": dict_of(tensor(), tensors)})

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen = dict(state["seen"])
