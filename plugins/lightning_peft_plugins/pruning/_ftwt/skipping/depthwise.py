"""Depthwise convolutions of selected channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_peft_plugins.pruning._ftwt.skipping.gathering import kept, rows_of
from lightning_peft_plugins.pruning._ftwt.skipping.selection import Choice, Selection, check_channels
from lightning_peft_plugins.pruning._ftwt.skipping.shell import Shell


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
        if selection.fixed is not None:
            self.weight = kept(self.weight, 0, selection.fixed)
            self.bias = None if self.bias is None else kept(self.bias, 0, selection.fixed)
            selection = Selection(len(selection.fixed), 1)
        self.selection = selection
        self._shell = Shell(layer)

    def forward(self, inputs: Tensor) -> Tensor:
        """Filter the channels at hand."""
        choice = self.selection.now
        check_channels(inputs, 1, choice.width, self.weight.ndim)
        return self.compute(inputs, choice)

    def compute(self, inputs: Tensor, choice: Choice) -> Tensor:
        """Filter inputs that are reduced to a choice, or whole."""
        if choice.index is None:
            return self._shell(inputs, self.weight, self.bias, self.weight.shape[0])
        weight = rows_of(self.weight, choice)
        bias = None if self.bias is None else rows_of(self.bias, choice)
        return self._shell(inputs, weight, bias, len(weight))
