"""What a tensor gains: values at its sensitive entries, or a product of thin matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.deltas.form import Form, build_form, described
from lightning_peft_plugins.selective._shared.roomy_values import RoomyValues

_LOW_RANK = -1  # stands where the coordinates would


class SensitiveValues(RoomyValues):
    """Adds nothing until it is said what: values at coordinates, or a low-rank form.

    Args:
        size: Elements of the tensor.
        room: How many coordinates there can be at most.
        form: The form, or what :func:`~lightning_peft.deltas.form.described` says of it; ``None`` where there can be none.

    Attributes:
        low_rank: Whether the form acts.
    """

    kind = "sensitive_values"

    def __init__(self, size: int, room: int, form: Form | Mapping[str, Any] | None = None) -> None:
        super().__init__(size, room)
        self.form = form if isinstance(form, Form) or form is None else build_form(**form)
        self.low_rank = False

    def forward(self, weight: Tensor) -> Tensor:
        return self.form.on_weight(weight) if self.low_rank and self.form is not None else super().forward(weight)

    def choose(self, indices: Tensor, *, low_rank: bool = False) -> None:
        """Train values at these coordinates from now on, or the form in place of them."""
        super().choose(indices[:0] if low_rank else indices)
        self.low_rank = low_rank

    @property
    def tuned(self) -> int:
        """How many numbers are trained."""
        if self.low_rank and self.form is not None:
            return sum(parameter.numel() for parameter in self.form.parameters())
        return len(self.indices)

    def idle(self) -> Iterator[nn.Parameter]:
        """The parameters that take no part."""
        if not len(self.indices):
            yield self.values
        if self.form is not None and not self.low_rank:
            yield from self.form.parameters()

    def config(self) -> dict[str, Any]:
        return {**super().config(), "form": None if self.form is None else described(self.form)}

    def get_extra_state(self) -> Tensor:
        return torch.tensor([_LOW_RANK]) if self.low_rank else self.indices

    def set_extra_state(self, state: Tensor) -> None:
        low_rank = isinstance(state, Tensor) and self.form is not None and state.tolist() == [_LOW_RANK]
        super().set_extra_state(torch.arange(0) if low_rank else state)
        self.low_rank = low_rank
