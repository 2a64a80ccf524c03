"""Measuring, layer by layer, which way of computing is fastest here, and which units are worth their predictor."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.skipping.layers import SelectiveFilter, SelectiveLayer, Way
from lightning_peft.skipping.selection import Selection, spread

_ROUNDS = 2


@torch.no_grad()
def calibrate_layers(network: nn.Module, samples: Sequence[Tensor]) -> dict[Selection, float]:
    """Give every selective layer the way that was fastest on real inputs, in place, and say what each unit saves.

    All ways of a layer are timed one after another on the input at hand, with the channels it needs, so a slow moment of the
    machine hits them alike. Sizes a kernel has not seen yet cost what they will cost later: each sample is timed once a round.

    Args:
        network: A network with selective layers.
        samples: Inputs, one sample each.

    Returns:
        Seconds that selecting its channels saves a unit for one sample, predictor included; negative where it does not pay.
    """
    probe = _Probe()
    handles = [
        layer.register_forward_pre_hook(probe.time_layer if isinstance(layer, SelectiveLayer) else probe.time_filter)
        for layer in network.modules()
        if isinstance(layer, SelectiveLayer | SelectiveFilter)
    ]
    try:
        for _ in range(_ROUNDS):
            for sample in samples:
                network(sample)
    finally:
        for handle in handles:
            handle.remove()
    gains = probe.finish()
    _round_where_needed(network)
    return gains


def _round_where_needed(network: nn.Module) -> None:
    """Numbers of channels are rounded up for kernels that are prepared for a size; products of matrices take any."""
    sized: set[Selection] = set()
    selections: set[Selection] = set()
    for layer in network.modules():
        if isinstance(layer, SelectiveFilter):
            sized.add(layer.selection)
        elif isinstance(layer, SelectiveLayer):
            for selection, gathered in ((layer.writes, layer.way.rows), (layer.reads, layer.way.columns)):
                if selection is not None:
                    selections.add(selection)
                    if gathered and not layer.way.product:
                        sized.add(selection)
    for selection in selections - sized:
        selection.step = 1


class _Probe:
    """Times of every layer: as it is in each way, with all outputs, with all inputs."""

    def __init__(self) -> None:
        self._ways: dict[SelectiveLayer, dict[Way, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._gain: dict[tuple[Selection, nn.Module], list[float]] = defaultdict(list)
        self._less_rows: dict[SelectiveLayer, dict[Way, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._less_columns: dict[SelectiveLayer, dict[Way, list[float]]] = defaultdict(lambda: defaultdict(list))

    def time_layer(self, layer: SelectiveLayer, args: tuple[Any, ...]) -> None:
        inputs, reads, writes = args[0], layer.reads, layer.writes
        if layer.predictor is not None and writes is not None:
            start = time.perf_counter()
            writes.choose(layer.predictor(inputs, layer.seen), dense=layer.dense)
            self._gain[writes, layer.predictor].append(start - time.perf_counter())
        self._time_ways(layer, inputs, self._ways[layer])
        if writes is not None:
            layer.writes = None
            self._time_ways(layer, inputs, self._less_rows[layer])
            layer.writes = writes
        if reads is not None:
            whole = inputs if reads.index is None else spread(inputs, reads, 1 if layer.convolution else -1)
            layer.reads = None
            self._time_ways(layer, whole, self._less_columns[layer])
            layer.reads = reads

    def time_filter(self, layer: SelectiveFilter, args: tuple[Any, ...]) -> None:
        inputs, selection = args[0], layer.selection
        now = _seconds(lambda: layer.compute(inputs, selection))
        if selection.index is not None:
            whole = spread(inputs, selection, 1)
            self._gain[selection, layer].append(_seconds(lambda: layer.compute(whole, Selection(selection.channels, 1))) - now)

    def _time_ways(self, layer: SelectiveLayer, inputs: Tensor, times: Mapping[Way, list[float]]) -> None:
        for way in layer.ways():
            times[way].append(_seconds(lambda way=way: layer.compute(inputs, way)))  # type: ignore[misc]

    def finish(self) -> dict[Selection, float]:
        """Choose the ways, and add up what each unit saves."""
        for layer, times in self._ways.items():
            way = _fastest(times)
            layer.settle(way)
            now = statistics.median(times[way])
            for selection, others in ((layer.writes, self._less_rows[layer]), (layer.reads, self._less_columns[layer])):
                if selection is not None:
                    self._gain[selection, layer].append(statistics.median(others[_fastest(others)]) - now)
        total: dict[Selection, float] = defaultdict(float)
        for (selection, _), gains in self._gain.items():
            total[selection] += statistics.median(gains)
        return dict(total)


def _fastest(times: Mapping[Way, list[float]]) -> Way:
    return min(times, key=lambda way: statistics.median(times[way]))


def _seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    output = function()
    if output.is_cuda:
        torch.cuda.synchronize(output.device)
    return time.perf_counter() - start
