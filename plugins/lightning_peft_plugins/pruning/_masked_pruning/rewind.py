"""The values a network goes back to once it is known which of its weights matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft import Lane, Run
from lightning_peft.compose.schedule import Point
from lightning_peft.contract import methods_of
from lightning_peft.structure.carry import reset_states
from lightning_peft.structure.forms import Form, anything, dict_of
from lightning_peft.weights.maps import plain_tensors
from lightning_peft.weights.shards import spread_as


class Rewind:
    """Goes back, after each choice of masks, to what all parameters and buffers were at one step (Frankle et al., ICML 2020).

    Args:
        to: That step; ``None`` to train on, always.

    Attributes:
        values: The tensors of that step, by plain name; empty before it.
        at: Its number in this training.
        due: Whether masks were chosen since the last way back.
    """

    def __init__(self, to: Point | None) -> None:
        self.to = to
        self.values: dict[str, Tensor] = {}
        self.at, self.due = 0, False

    def start(self, run: Run, first_choice: int, name: str) -> None:
        """Place the step in a training.

        Args:
            run: The training.
            first_choice: Step of the first choice of masks.
            name: The method's, for the message.

        Raises:
            MisconfigurationException: Masks are chosen before that step, or another method changes the structure.
        """
        if self.to is None:
            return
        self.at = run.place(self.to, "rewind=")
        if self.at >= first_choice:
            raise MisconfigurationException(
                f"rewind= goes back to step {self.at}, but masks are chosen from step {first_choice} on. "
                "Choose later with start=."
            )
        for other in methods_of(run.trainer.callbacks):  # type: ignore[attr-defined]
            if other.lane == Lane.STRUCTURE:
                raise MisconfigurationException(f"{name} cannot rewind a network that {other.name} grows. Leave rewind= out.")
        self.take_when_due(run)

    def take_when_due(self, run: Run) -> None:
        """Keep the tensors of now, if this is the step."""
        if self.to is not None and run.step == self.at and not self.values:
            self.values = {name: tensor.detach().clone() for name, tensor in plain_tensors(run.module).items()}

    def chosen(self) -> None:
        """Note that masks were chosen."""
        self.due = self.to is not None

    @torch.no_grad()
    def restore_when_due(self, run: Run) -> None:
        """Go back: optimizers and schedules begin anew too."""
        if not self.due:
            return
        self.due = False
        tensors = plain_tensors(run.module)
        for name, value in self.values.items():
            tensors[name].copy_(spread_as(tensors[name], value))
        reset_states(run.trainer.optimizers)
        for schedule in run.schedules:
            schedule.restart()


def rewind_form(tensors: Mapping[str, Tensor] | None) -> Form:
    """What :attr:`Rewind.values` look like: nothing yet, or all tensors of the module."""

    def check(value: Any, place: str) -> str | None:
        if (found := dict_of(anything, tensors)(value, place)) is not None:
            return found
        if tensors is not None and value and (lost := next((name for name in tensors if name not in value), None)) is not None:
            return f"{place} lacks {lost!r}"
        for name, item in value.items():
            like = None if tensors is None else tensors[name]
            # Not of its type: precision="bf16-true" converts a module after this.
            if not isinstance(item, Tensor) or (like is not None and _kind(item) != _kind(like)):
                return f"{place}[{name!r}] is not a tensor like the module's"
        return None

    return check


def _kind(tensor: Tensor) -> tuple[torch.Size, bool]:
    return tensor.shape, tensor.is_floating_point()
