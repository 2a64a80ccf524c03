"""How far models are from what they are merged around, and which way the merged one went: a piece of a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.merging.combining import Progress
from lightning_peft.merging.matching import Entry
from lightning_peft.merging.model import Model
from lightning_peft.merging.stacks import Stacker


@dataclass(frozen=True)
class Distances:
    """Differences to the base, or to the mean of the models where there is none, over all merged tensors.

    Attributes:
        norms: Norm of each model's difference.
        merged: Norm of the merged difference.
        cosines: Cosine of each model's difference to the merged one; ``None`` where one of them is zero.
    """

    norms: tuple[float, ...]
    merged: float
    cosines: tuple[float | None, ...]


@torch.no_grad()
def distances(
    models: Sequence[Model],
    base: Model | None,
    merged: Mapping[str, Tensor],
    entries: Sequence[Entry],
    progress: Progress | None = None,
) -> Distances:
    """Measure.

    Args:
        models: What was merged.
        base: What they were trained from, if it is known.
        merged: The merged state dict.
        entries: What became of each tensor; those that were merged count.
        progress: Called with the number of entries that are done, and of all.
    """
    stacker = Stacker(models, base, torch.float64 if _double(merged) else torch.float32)
    names = [entry.name for entry in entries if entry.fate == "merged"]
    squares, products = (torch.zeros(len(models), dtype=torch.float64) for _ in range(2))
    own, done, total = torch.zeros((), dtype=torch.float64), 0, sum(merged[name].numel() for name in names)
    for name in names:
        flat = merged[name].reshape(-1)
        for piece in stacker.pieces(name):
            values = stacker.values(name, piece)
            origin = values.mean(0) if base is None else stacker.of_base(name, piece)
            values.sub_(origin)
            result = flat[piece].to(stacker.dtype) - origin
            squares += values.square().sum(1)
            products += values @ result
            own += result.square().sum()
        done += flat.numel()
        if progress is not None:
            progress(done, total)
    return Distances(
        tuple(squares.sqrt().tolist()),
        float(own.sqrt()),
        tuple(_cosine(product, one, float(own)) for product, one in zip(products.tolist(), squares.tolist(), strict=True)),
    )


def _double(merged: Mapping[str, Tensor]) -> bool:
    return any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in merged.values())


def _cosine(product: float, one: float, other: float) -> float | None:
    # What is left of the mean less the mean is rounding, and has no direction.
    return product / (one * other) ** 0.5 if min(one, other) > 1e-12 * max(one, other) else None
