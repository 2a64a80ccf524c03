"""The frozen weights below deltas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_peft.deltas.delta_map import DeltaMap
from lightning_peft.deltas.delta_part import DeltaPart
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.parts import placed_parts


def frozen_weights(module: nn.Module, method: str) -> Iterator[tuple[str, Any, Tensor]]:
    """Yield the deltas of a method with the weights below them, those beside layers first.

    Args:
        module: The module that the deltas stand on.
        method: Name of the method.

    Yields:
        The name of the tensor, the form, and the weight as a matrix, without a graph and in the form's precision.
    """
    for name, form, weight in _weights(module, method):
        yield name, form, form.layout.matrix(weight.detach()).to(next(form.parameters()).dtype)


def _weights(module: nn.Module, method: str) -> Iterator[tuple[str, Any, Tensor]]:
    for placed in placed_parts(module):
        if placed.part.method == method and isinstance(placed.part, DeltaPart):
            yield f"{placed.path}.weight".removeprefix("."), placed.part.form, placed.layer.weight  # type: ignore[misc]
    for mapped in mapped_tensors(module):
        for each in mapped.maps:
            if each.method == method and isinstance(each, DeltaMap):
                yield mapped.name, each.form, mapped.entering(each)
