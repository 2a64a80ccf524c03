"""The matrices a module holds, with and without the deltas on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.compose.lanes import Lane
from lightning_peft.deltas.layout import layout_of
from lightning_peft.weights.attachment import Attachment
from lightning_peft.weights.mapped_layer import MappedLayer
from lightning_peft.weights.shards import read_whole, whole


@dataclass(frozen=True)
class Matrix:
    """A parameter of two dimensions or more; masks on it, and what stands outside of them, are not seen here.

    Where it is a shard, its values are those of the whole, for which every process has to ask.

    Attributes:
        name: Its qualified name.
        layer: The layer that holds it.
        key: Its name there.
    """

    name: str
    layer: nn.Module
    key: str

    @property
    def stored(self) -> nn.Parameter:
        """The parameter."""
        return self.layer._parameters[self.key]  # type: ignore[return-value]

    @property
    def has_delta(self) -> bool:
        """Whether a delta is on it."""
        return bool(self._maps(delta=True) or self._parts())

    @torch.no_grad()
    def base(self) -> Tensor:
        """Return what deltas are added to."""
        value: Tensor = whole(self.stored.detach())
        maps = self._maps(delta=False)
        with read_whole(*maps):
            for weight_map in maps:
                value = weight_map(value)
        return value

    @torch.no_grad()
    def seen(self) -> Tensor:
        """Return the value with its deltas, in double precision where there are any: a sum would round them away."""
        value = self.base()
        if self.has_delta:
            value = value.double()
        maps, parts = self._maps(delta=True), self._parts()
        with read_whole(*maps, *parts):
            for weight_map in maps:
                value = weight_map(value)
            for part in parts:
                value = part.merged(value)
        return value

    def split(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield one of its values as named matrices of outputs and inputs: one, or those of a stack."""
        layout = layout_of(self.layer, value, self.key)
        if layout.stacked:
            yield from ((f"{self.name}[{place}]", matrix) for place, matrix in enumerate(value))
        else:
            yield self.name, layout.matrix(value)

    def _maps(self, *, delta: bool) -> list[Any]:
        chain = self.layer.weight_maps.get(self.key) if isinstance(self.layer, MappedLayer) else None
        inner = [] if chain is None else [entry for entry in chain.active if entry.lane < Lane.MASK]
        return [entry for entry in inner if (entry.lane == Lane.DELTA) == delta]

    def _parts(self) -> list[Any]:
        stack = self.layer.part_stack if isinstance(self.layer, MappedLayer) and self.key == "weight" else None
        return [] if stack is None else [part for part in stack.merging if part.lane == Lane.DELTA]


def matrices(module: nn.Module) -> Iterator[Matrix]:
    """Yield each matrix of a module once, in its order.

    Those of weight maps and layer parts are left out, and those that a parametrization of the user's computes.
    """
    known: set[int] = set()
    beside = {inner for part in module.modules() if isinstance(part, Attachment) for inner in part.modules()}
    for path, layer in module.named_modules():
        if layer in beside or isinstance(layer, parametrize.ParametrizationList):
            continue
        for key, tensor in layer._parameters.items():
            if tensor is not None and tensor.ndim > 1 and tensor.is_floating_point() and id(tensor) not in known:
                known.add(id(tensor))
                yield Matrix(f"{path}.{key}".removeprefix("."), layer, key)
