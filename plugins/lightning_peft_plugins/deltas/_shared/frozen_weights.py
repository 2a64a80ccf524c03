"""The frozen weights below deltas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lightning_peft.deltas.delta_map import DeltaMap
from lightning_peft.deltas.on_module import Delta
from lightning_peft.weights.maps import MappedTensor
from lightning_peft.weights.shards import whole


def frozen_weights(module: nn.Module, deltas: Iterable[tuple[str, Delta]]) -> Iterator[tuple[str, Any, Tensor]]:
    """Yield deltas with the weights below them.

    Args:
        module: The module that the deltas stand on.
        deltas: The deltas, each with the name of its tensor.

    Yields:
        The name of the tensor, the form, and the weight as a matrix, without a graph and in the form's precision.
    """
    for name, delta in deltas:
        path, _, key = name.rpartition(".")
        layer, form = module.get_submodule(path), delta.form
        weight: Any = MappedTensor(name, layer, key).entering(delta) if isinstance(delta, DeltaMap) else layer.weight
        yield name, form, form.layout.matrix(whole(weight.detach())).to(next(form.parameters()).dtype)
