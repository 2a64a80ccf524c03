"""The values a network goes back to once it is known which of its weights matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_peft.compose.run import Run
from lightning_peft.structure.carry import reset_states
from lightning_peft.structure.forms import Form, anything, dict_of
from lightning_peft.weights.maps import plain_tensors


class Rewind:
    """Keeps all parameters and buffers as they were at one step (Frankle et al., ICML 2020).

    Attributes:
        values: They, by plain name; empty before that step.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def take(self, module: LightningModule) -> None:
        """Keep the values of now."""
        self.values = {name: tensor.detach().clone() for name, tensor in plain_tensors(module).items()}

    @torch.no_grad()
    def restore(self, run: Run) -> None:
        """Go back to them: optimizers and schedules begin anew too."""
        tensors = plain_tensors(run.module)
        for name, value in self.values.items():
            tensors[name].copy_(value)
        reset_states(run.trainer.optimizers)
        for schedule in run.schedules:
            schedule.restart()

    def state(self) -> dict[str, Any]:
        """They, as plain data."""
        return dict(self.values)


def rewind_form(tensors: Mapping[str, Tensor] | None) -> Form:
    """What :meth:`Rewind.state` looks like: nothing yet, or all tensors of the module."""

    def check(value: Any, place: str) -> str | None:
        if (found := dict_of(anything, tensors)(value, place)) is not None:
            return found
        if tensors is not None and value and (lost := next((name for name in tensors if name not in value), None)) is not None:
            return f"{place} lacks {lost!r}"
        for name, item in value.items():
            like = None if tensors is None else tensors[name]
            if not isinstance(item, Tensor) or (like is not None and (item.shape, item.dtype) != (like.shape, like.dtype)):
                return f"{place}[{name!r}] is no tensor like the module's"
        return None

    return check
