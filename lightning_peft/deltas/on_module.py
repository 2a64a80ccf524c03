"""The deltas on a module, on either side of its layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_peft.deltas.delta_map import DeltaMap
from lightning_peft.deltas.delta_part import DeltaPart
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.parts import placed_parts

Delta = DeltaPart | DeltaMap


def deltas_on(module: nn.Module) -> Iterator[tuple[str, Delta]]:
    """Yield the deltas on a module, each with the name of its tensor, those beside layers first."""
    for placed in placed_parts(module):
        if isinstance(placed.part, DeltaPart):
            yield f"{placed.path}.weight".removeprefix("."), placed.part
    for mapped in mapped_tensors(module):
        for each in mapped.maps:
            if isinstance(each, DeltaMap):
                yield mapped.name, each
