"""Depthwise convolutions of selected channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_peft.skipping.gathering import kept, rows_of
from lightning_peft.skipping.selection import Selection
from lightning_peft.skipping.shell import Shell


class SelectiveFilter(nn.Module):
    """A depthwise convolution on the channels of a selection.

    Args:
        layer: The convolution, its norm folded into it; its weight is shared.
        selection: The channels it is given.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any, selection: Selection) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        if selection.fixed:
            assert selection.index is not None
            self.weight = kept(self.weight, 0, selection.index)
            self.bias = None if self.bias is None else kept(self.bias, 0, selection.index)
            selection = Selection(selection.count, 1)
        self.selection = selection
        self._shell = Shell(layer)

    def forward(self, inputs: Tensor) -> Tensor:
        """Filter the channels at hand."""
        return self.compute(inputs, self.selection)

    def compute(self, inputs: Tensor, selection: Selection) -> Tensor:
        """Filter inputs that are reduced to a selection, or whole."""
        if selection.index is None:
            return self._shell(inputs, self.weight, self.bias, self.weight.shape[0])
        weight = rows_of(self.weight, selection)
        bias = None if self.bias is None else rows_of(self.bias, selection)
        return self._shell(inputs, weight, bias, len(weight))
