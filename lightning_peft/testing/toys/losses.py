"""A loss term with state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.loss import Step
from lightning_peft.compose.run import Run
from lightning_peft.method import Method
from lightning_peft.structure.forms import Form, fields, whole


class ToyEntropy(Method):
    """Loss term with state: rewards confident predictions, and counts the steps and epochs it took part in."""

    lane = Lane.LOSS
    reads = frozenset({Resource.LOGITS, Resource.SAMPLE_INDEX})

    def __init__(self, weight: float = 0.1, *, network: str | None = None, name: str | None = None) -> None:
        super().__init__(network=network, name=name)
        self.weight = weight
        self.seen: dict[str, Any] = {"optimizer_steps": 0, "epochs": 0, "last_index": torch.zeros(0, dtype=torch.int64)}

    def loss(self, step: Step) -> Tensor:
        if not step.repeated:
            self.seen["last_index"] = step.sample_index
        probabilities = step.logits.softmax(-1)
        return self.weight * (1 - probabilities.square().sum(-1)).mean()

    def after_step(self, run: Run) -> None:
        self.seen["optimizer_steps"] += 1

    def epoch_end(self, run: Run) -> None:
        self.seen["epochs"] += 1

    def metrics(self, run: Run) -> dict[str, float]:
        return {"optimizer_steps": float(self.seen["optimizer_steps"])}

    def state(self) -> dict[str, Any]:
        return dict(self.seen)

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"optimizer_steps": whole(), "epochs": whole(), "last_index": _indices})

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen = dict(state)


def _indices(value: Any, place: str) -> str | None:
    fits = isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 1
    return None if fits else f"{place} is not a vector of sample positions"
