"""Watches the layers of a training for what scores are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.capture.layer_calls import LayerCalls
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.structure.edits import Change
from lightning_peft.structure.forms import Form, anything, dict_of
from lightning_peft.weights.maps import MappedTensor
from lightning_peft_plugins.pruning._shared.layer_statistics import FROM_CALLS, LayerStatistics, Quantity, statistics_form


class LayerRecorder:
    """Keeps the statistics of every target.

    Args:
        reads: What is to be seen; nothing is watched for an empty set.
        wanted: Whether what happens now bears on a choice.
        in_step: Whether a call of a layer is part of a training step.
    """

    def __init__(self, reads: frozenset[Quantity], wanted: Callable[[], bool], in_step: Callable[[], bool]) -> None:
        self.reads, self.wanted, self.in_step = reads, wanted, in_step
        self.seen: dict[str, LayerStatistics] = {}
        self._calls = LayerCalls()

    def of(self, name: str) -> LayerStatistics:
        """Return the statistics of a tensor."""
        return self.seen.setdefault(name, LayerStatistics(self.reads))

    def open(self, targets: Iterable[MappedTensor]) -> None:
        """Begin to see what layers are given and give."""
        self.close()
        if self.reads & FROM_CALLS:
            self._calls.open({mapped.name: mapped.layer for mapped in targets}, self._see)

    def _see(self, name: str, layer: nn.Module, given: Any, output: Any) -> None:
        if self.in_step() and self.wanted():
            seen = self.of(name)
            seen.see_inputs(layer, given)
            seen.see_outputs(layer, given, output)

    def see_gradients(self, targets: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer) -> None:
        """See the gradients of those tensors, given with their names, that an optimizer is about to move."""
        if not self.reads or not self.wanted():
            return
        moved = trained_by(optimizer)
        for name, stored in targets:
            if stored in moved and stored.grad is not None:
                self.of(name).see_gradient(stored.detach(), stored.grad)

    def forget(self, change: Change) -> None:
        """Let go of what was seen of tensors that an edit moved or gave another size."""
        sized = change.edit.get("tensors", ())
        self.seen = {name: seen for name, seen in self.seen.items() if change.new_name(name) == name and name not in sized}

    def close(self) -> None:
        """Stop looking at layers."""
        self._calls.close()

    def state(self) -> dict[str, Any]:
        """What was seen of gradients, as plain data."""
        return {name: seen.state() for name, seen in self.seen.items()}

    def of_calls(self) -> dict[str, Any]:
        """What this rank saw of calls of its own, as plain data."""
        return {name: seen.of_calls() for name, seen in self.seen.items()} if self.reads & FROM_CALLS else {}

    def form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        """What :meth:`state` looks like, names and shapes held against tensors where they are at hand."""
        return self._form(self.reads - FROM_CALLS, tensors, ("steps",))

    def calls_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        """What :meth:`of_calls` looks like, likewise."""
        return self._form(self.reads & FROM_CALLS, tensors, ("samples", "calls"))

    @staticmethod
    def _form(quantities: frozenset[Quantity], tensors: Mapping[str, Tensor] | None, counts: Sequence[str]) -> Form:
        def check(value: Any, place: str) -> str | None:
            if (found := dict_of(anything, tensors)(value, place)) is not None:
                return found
            shapes = {name: None if tensors is None else tensors[name].shape for name in value}
            forms = {name: statistics_form(quantities, shape, counts) for name, shape in shapes.items()}
            return next(filter(None, (form(value[name], f"{place}[{name!r}]") for name, form in forms.items())), None)

        return check

    @staticmethod
    def pooled(states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """See :meth:`LayerStatistics.pooled`."""
        names = dict.fromkeys(name for state in states for name in state)
        return {name: LayerStatistics.pooled([state[name] for state in states if name in state], rank) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` or :meth:`of_calls` gave."""
        for name, seen in state.items():
            self.of(name).load_state(seen)
