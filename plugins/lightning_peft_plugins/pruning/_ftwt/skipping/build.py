"""Putting layers that select channels into a network."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.network.channel_units import ChannelUnit
from lightning_peft.network.layers import is_conv
from lightning_peft_plugins.pruning._ftwt.skipping.depthwise import SelectiveFilter
from lightning_peft_plugins.pruning._ftwt.skipping.fold import set_layer
from lightning_peft_plugins.pruning._ftwt.skipping.layers import SelectiveLayer
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import ChannelPredictor
from lightning_peft_plugins.pruning._ftwt.skipping.selection import Selection, SelectionGate, memory_format
from lightning_peft_plugins.pruning._ftwt.skipping.shell import why_whole
from lightning_peft_plugins.pruning._ftwt.skipping.unit_predictor import UnitPredictor
from lightning_peft_plugins.pruning._ftwt.skipping.whole import ChoosingLayer

_LANES = 16  # channels that vector kernels take at a time; depthwise ones are half as fast on other numbers


def build(
    dense: nn.Module,
    units: Sequence[ChannelUnit],
    predictors: Mapping[str, ChannelPredictor],
    masked: Collection[str],
    tokens: bool,
    fixed: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put selective layers into a copy of a network.

    Args:
        dense: The network, norms folded.
        units: The gated units.
        predictors: Predictor by the unit's producer.
        masked: Producers of units that are computed whole and masked.
        tokens: Whether each token of a linear unit is judged on its own.
        fixed: Channels of units that compute the same ones for every input, by producer.
    """
    fixed = fixed or {}
    network = copy.deepcopy(dense)
    selections = {
        unit.producer: Selection(unit.channels, max(_LANES, unit.channels // 16), fixed.get(unit.producer)) for unit in units
    }
    readers = {reader: unit for unit in units for reader in unit.consumers if unit.producer not in masked}
    for name in dict.fromkeys([*readers, *(unit.producer for unit in units)]):
        layer = network.get_submodule(name)
        reads = (
            selections[readers[name].producer] if name in readers and _reads_channels(network, readers[name], name) else None
        )
        writes = selections.get(name)
        predictor = None
        if writes is not None:
            settled = selections[readers[name].producer].fixed if reads is not None else None
            predictor = UnitPredictor(predictors[name], convolution=is_conv(layer), tokens=tokens, fixed=settled)
        set_layer(network, name, _selecting(layer, reads, writes, predictor, whole=name in masked))
    for unit in units:
        convolution = is_conv(dense.get_submodule(unit.producer))
        for name in unit.chain:
            layer = network.get_submodule(name)
            if is_conv(layer) and unit.producer not in masked:
                set_layer(network, name, SelectiveFilter(layer, selections[unit.producer]))
        opens = not unit.consumers or any(not _reads_channels(dense, unit, reader) for reader in unit.consumers)
        gate = SelectionGate(selections[unit.producer], 1 if convolution else -1, opens=opens)
        set_layer(network, unit.gate, nn.Sequential(network.get_submodule(unit.gate), gate))
    return network


def _selecting(
    layer: nn.Module, reads: Selection | None, writes: Selection | None, predictor: UnitPredictor | None, *, whole: bool
) -> nn.Module:
    """A layer that computes what is selected, or all of it."""
    if why_whole(layer):
        assert whole
        assert writes is not None
        assert predictor is not None
        return ChoosingLayer(layer, writes, predictor)
    selective = SelectiveLayer(layer, reads, writes, predictor)
    selective.dense = whole
    return selective


def _reads_channels(network: nn.Module, unit: ChannelUnit, reader: str) -> bool:
    """Whether a reader's columns are the unit's channels, one each; a linear layer behind a flattened map has many for one."""
    layer: Any = network.get_submodule(reader)
    return bool(layer.weight.shape[1] == unit.channels)


def producer_of(network: nn.Module, unit: ChannelUnit) -> SelectiveLayer | ChoosingLayer:
    """The layer that computes a unit's channels; a gate may stand behind it in its place."""
    layer: Any = network.get_submodule(unit.producer)
    layer = layer[0] if isinstance(layer, nn.Sequential) else layer
    assert isinstance(layer, SelectiveLayer | ChoosingLayer)
    return layer


def lay_out(network: nn.Module, *, channels_last: bool) -> nn.Module:
    """Let a network with selective layers compute its feature maps in a memory layout, in place.

    Weights to gather from stay as they are: their rows are read in long runs.
    """
    for layer in network.modules():
        if isinstance(layer, SelectiveLayer | SelectionGate):
            layer.channels_last = channels_last
        elif isinstance(layer, nn.Conv2d):
            layer.to(memory_format=memory_format(channels_last))
    return network
