"""One tensor of every model, stacked, whole or in pieces."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.model import Model

PIECE = 1 << 19
"""Entries of a piece, of all models together; a merge makes several passes over it, which the processor's cache serves."""


@dataclass(frozen=True)
class Stacker:
    """Reads models together.

    Attributes:
        models: The models.
        base: What differences are taken to.
        dtype: What is computed in.
    """

    models: Sequence[Model]
    base: Model | None
    dtype: torch.dtype

    def values(self, name: str, piece: slice | None = None) -> Tensor:
        """Return a tensor of every model, ``(n, *shape)``, or a piece of it, flat.

        Raises:
            MergeError: A value is not finite.
        """
        parts = [self._part(model, name, piece) for model in self.models]
        stack = torch.empty(len(parts), *parts[0].shape, dtype=self.dtype)
        for row, part in zip(stack, parts, strict=True):
            row.copy_(part)
        for model, row in zip(self.models, stack, strict=True):
            check_finite(model, name, row)
        return stack

    def deltas(self, name: str, piece: slice | None = None) -> Tensor:
        """Return what a tensor of every model differs from the base's by, like :meth:`values`."""
        return self.values(name, piece).sub_(self.of_base(name, piece))

    def of_base(self, name: str, piece: slice | None = None) -> Tensor:
        """Return the base's tensor, or a piece of it.

        Raises:
            MergeError: A value is not finite.
        """
        assert self.base is not None
        found = self._part(self.base, name, piece).to(self.dtype)
        check_finite(self.base, name, found)
        return found

    def pieces(self, name: str) -> Iterator[slice]:
        """Cut a tensor, laid out flat, into pieces."""
        size, step = self.models[0].tensors[name].numel(), max(1, PIECE // len(self.models))
        return (slice(start, min(start + step, size)) for start in range(0, size, step))

    @staticmethod
    def _part(model: Model, name: str, piece: slice | None) -> Tensor:
        tensor = model.value(name).cpu()
        return tensor if piece is None else tensor.reshape(-1)[piece]


def check_finite(model: Model, name: str, values: Tensor) -> None:
    """Refuse a model with a number that is none.

    Raises:
        MergeError: It has one.
    """
    # A sum is quick, and not finite where a number is not; of large numbers it may overflow all the same.
    if not math.isfinite(values.sum()) and not bool(torch.isfinite(values).all()):
        raise MergeError(
            f"{name} of {model.label} holds numbers that are not finite, which would spoil the merged model. Leave that model "
            "out, or use an earlier checkpoint of it."
        )


def generators(seed: int, name: str, count: int) -> list[torch.Generator]:
    """Return a source of chance for each model, the same for a tensor whatever is merged before it.

    Args:
        seed: The user's seed.
        name: Name of the tensor.
        count: Number of models.
    """
    found = []
    for place in range(count):
        digest = hashlib.sha256(f"{seed} {place} {name}".encode()).digest()
        found.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True)))
    return found
