"""A product in blocks, beside a layer."""

from __future__ import annotations

from typing import Any

from lightning_peft.deltas.delta_part import DeltaPart
from lightning_peft.weights.layer_part import Follows


class BlocksPart(DeltaPart):
    """Tells that inputs and outputs of every block are those of the weight, where it has two dimensions."""

    form: Any

    @property
    def follows(self) -> Follows | None:  # type: ignore[override]
        if len(self.form.layout.shape) != 2:
            return None
        inputs, outputs = (0, 1) if self.form.layout.transposed else (1, 0)
        down = {f"form.down.{place}": {1: ("weight", inputs)} for place in range(len(self.form.down))}
        return down | {f"form.up.{place}": {0: ("weight", outputs)} for place in range(len(self.form.up))}
