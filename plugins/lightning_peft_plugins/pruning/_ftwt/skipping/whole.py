"""Layers that are computed whole, as they are, in a unit whose channels are masked."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_peft_plugins.pruning._ftwt.skipping.selection import Selection
from lightning_peft_plugins.pruning._ftwt.skipping.unit_predictor import UnitPredictor


class ChoosingLayer(nn.Module):
    """A layer that has more than a weight and a bias, and the choice of the channels that are masked behind it.

    Args:
        layer: The layer.
        writes: Where to put the choice.
        predictor: Chooses from the input.
    """

    def __init__(self, layer: nn.Module, writes: Selection, predictor: UnitPredictor) -> None:
        super().__init__()
        self.layer, self.writes, self.predictor = layer, writes, predictor

    def forward(self, inputs: Tensor) -> Tensor:
        """Choose, and compute everything."""
        self.predictor.choose(inputs, None, self.writes, dense=True)
        result: Tensor = self.layer(inputs)
        return result
