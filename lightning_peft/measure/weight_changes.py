"""How far a matrix has moved in a training, and in how many directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.measure.spectra import effective_rank, intruder_dimensions, singular_values, stable_rank

MOST_WORK = 10**11
"""Products that the decompositions of one report may take: of each matrix its larger side times its smaller one squared."""


@dataclass(frozen=True)
class WeightChange:
    """What a training did to one matrix.

    Attributes:
        name: Qualified name of the tensor; of a stack of matrices with the position of this one.
        shape: Outputs and inputs, kernels among the inputs.
        norm: Frobenius norm of the change.
        relative: The same as a share of the norm it started from; ``None`` where that was zero.
        effective_rank: :func:`~lightning_peft.measure.spectra.effective_rank` of the change; ``None`` where it was not found.
        stable_rank: :func:`~lightning_peft.measure.spectra.stable_rank` of the change, likewise.
        intruders: :func:`~lightning_peft.measure.spectra.intruder_dimensions` of the changed matrix, likewise.
    """

    name: str
    shape: tuple[int, int]
    norm: float
    relative: float | None
    effective_rank: float | None = None
    stable_rank: float | None = None
    intruders: int | None = None


@dataclass(frozen=True)
class Learnt:
    """What a training changed.

    Attributes:
        rows: The matrices it trained, in the order of the module.
        notes: What is not among them and why, a sentence each.
        seconds: Time it took to find out.
    """

    rows: tuple[WeightChange, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_data(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Learnt:
        """Read what :meth:`as_data` returned, through JSON or not; nothing from nothing."""
        rows = tuple(WeightChange(**{**row, "shape": tuple(row["shape"])}) for row in data.get("rows", ()))
        return cls(rows, tuple(data.get("notes", ())), data.get("seconds", 0.0))


@torch.no_grad()
def weight_change(name: str, before: Tensor, after: Tensor, *, decompose: bool = True) -> WeightChange:
    """Measure how one matrix changed.

    Args:
        name: Its name.
        before: Shape ``(outputs, inputs)``.
        after: The same, later.
        decompose: Whether to find ranks and intruders too.

    Example:
        >>> before = torch.diag(torch.tensor([3.0, 4.0]))
        >>> weight_change("fc", before, before + torch.diag(torch.tensor([0.0, 1.0])))
        WeightChange(name='fc', shape=(2, 2), norm=1.0, relative=0.2, effective_rank=1.0, stable_rank=1.0, intruders=0)
    """
    change = after.double() - before.double()
    norm, old = float(change.norm()), float(before.double().norm())
    outputs, inputs = before.shape
    row = WeightChange(name, (outputs, inputs), norm, norm / old if old else None)
    if not decompose or not (math.isfinite(norm) and math.isfinite(old)):
        return row
    values = singular_values(change)
    found = (effective_rank(values), stable_rank(values), intruder_dimensions(before, after))
    return WeightChange(row.name, row.shape, row.norm, row.relative, *found)


def worth_decomposing(shapes: Sequence[tuple[int, int]], most: float = MOST_WORK) -> list[bool]:
    """Choose the matrices to decompose: all, or every second, third, ... so that no more products than ``most`` are taken.

    Example:
        >>> worth_decomposing([(2, 2), (4, 2), (2, 2)], most=16), worth_decomposing([(2, 2), (4, 2), (2, 2)], most=32)
        ([True, False, True], [True, True, True])
    """
    costs = [max(shape) * min(shape) ** 2 for shape in shapes]
    step = next((step for step in range(1, len(costs)) if sum(costs[::step]) <= most), max(1, len(costs)))
    return [place % step == 0 and cost <= most for place, cost in enumerate(costs)]
