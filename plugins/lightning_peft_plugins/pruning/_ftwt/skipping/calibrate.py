"""Measuring, layer by layer, which way of computing is fastest here, and which units are worth their predictor."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft_plugins.pruning._ftwt.skipping.depthwise import SelectiveFilter
from lightning_peft_plugins.pruning._ftwt.skipping.layers import Computation, SelectiveLayer
from lightning_peft_plugins.pruning._ftwt.skipping.selection import Choice, Selection, in_layout, spread

_ROUNDS = 2


@torch.no_grad()
def calibrate_layers(network: nn.Module, samples: Sequence[Tensor]) -> dict[Selection, float]:
    """Give every selective layer the way that was fastest on real inputs, in place, and say what each unit saves.

    A way is timed where the layer stands: the whole network computes a sample with every layer in one of its ways, then in the
    next. Timed one after another on the same layer, a way would find in the cache what the one before left there, or nothing of
    its own, and layers that are bound by reading their weight would be judged wrongly.

    Args:
        network: A network with selective layers.
        samples: Inputs, one sample each.

    Returns:
        Seconds that selecting its channels saves a unit for one sample, predictor included; negative where it does not pay.
    """
    probe = _Probe(network)
    with contextlib.ExitStack() as stack:
        for layer in probe.layers:
            stack.enter_context(layer.every_layout())
        for _ in range(_ROUNDS):
            probe.time_ways(samples)
        probe.time_others(samples)
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
                    if gathered and not (layer.way.product or layer.way.native):
                        sized.add(selection)
    for selection in selections - sized:
        selection.step = 1


class _Probe:
    """Times of every layer: as it is in each way, with all outputs, with all inputs."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.layers = [layer for layer in network.modules() if isinstance(layer, SelectiveLayer)]
        self._filters = [layer for layer in network.modules() if isinstance(layer, SelectiveFilter)]
        self._ways: dict[SelectiveLayer, dict[Computation, list[float]]] = {
            layer: {way: [] for way in layer.ways()} for layer in self.layers
        }
        self._now: dict[SelectiveLayer, list[float]] = defaultdict(list)
        self._gain: dict[tuple[Selection, nn.Module], list[float]] = defaultdict(list)
        self._less_rows: dict[SelectiveLayer, dict[Computation, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._less_columns: dict[SelectiveLayer, dict[Computation, list[float]]] = defaultdict(lambda: defaultdict(list))

    def time_ways(self, samples: Sequence[Tensor]) -> None:
        """Compute every sample with every layer in each of its ways."""
        start = 0.0

        def begin(layer: nn.Module, args: Any) -> None:
            nonlocal start
            start = time.perf_counter()

        def end(layer: Any, args: Any, output: Tensor) -> None:
            self._ways[layer][layer.way].append(_since(start, output))

        handles = [layer.register_forward_pre_hook(begin) for layer in self.layers]
        handles += [layer.register_forward_hook(end) for layer in self.layers]
        with _hooks(handles):
            for i in range(max(map(len, self._ways.values()), default=0)):
                for layer, ways in self._ways.items():
                    layer.way = list(ways)[i % len(ways)]
                for sample in samples:
                    self._network(sample)

    def time_others(self, samples: Sequence[Tensor]) -> None:
        """Compute every sample in the fastest ways, and time beside it what layers would take with all channels."""
        for layer, times in self._ways.items():
            layer.way = _fastest(times)
        handles = [layer.register_forward_pre_hook(self._time_layer) for layer in self.layers]
        handles += [layer.register_forward_pre_hook(self._time_filter) for layer in self._filters]
        with _hooks(handles):
            for sample in samples:
                self._network(sample)

    def _time_layer(self, layer: Any, args: tuple[Any, ...]) -> None:
        inputs, reads, writes = in_layout(args[0], layer.channels_last), layer.reads, layer.writes
        if layer.predictor is not None and writes is not None:
            start = time.perf_counter()
            layer.choose(inputs)
            self._gain[writes, layer.predictor].append(start - time.perf_counter())
        self._now[layer].append(_seconds(lambda: layer.compute(inputs, layer.way)))
        if writes is not None:
            layer.writes = None
            self._time_all(layer, inputs, self._less_rows[layer])
            layer.writes = writes
        if reads is not None:
            whole = inputs if reads.now.index is None else spread(inputs, reads.now, 1 if layer.convolution else -1)
            layer.reads = None
            self._time_all(layer, whole, self._less_columns[layer])
            layer.reads = reads

    def _time_filter(self, layer: Any, args: tuple[Any, ...]) -> None:
        inputs, choice = args[0], layer.selection.now
        now = _seconds(lambda: layer.compute(inputs, choice))
        if choice.index is not None:
            whole, every = spread(inputs, choice, 1), Choice(choice.channels, choice.channels)
            self._gain[layer.selection, layer].append(_seconds(lambda: layer.compute(whole, every)) - now)

    def _time_all(self, layer: SelectiveLayer, inputs: Tensor, times: dict[Computation, list[float]]) -> None:
        for way in layer.ways():
            times[way].append(_seconds(lambda way=way: layer.compute(inputs, way)))  # type: ignore[misc]

    def finish(self) -> dict[Selection, float]:
        """Settle the ways, and add up what each unit saves."""
        for layer in self.layers:
            layer.settle(_fastest(self._ways[layer]))
            now = statistics.median(self._now[layer])
            for selection, others in ((layer.writes, self._less_rows[layer]), (layer.reads, self._less_columns[layer])):
                if selection is not None:
                    self._gain[selection, layer].append(statistics.median(others[_fastest(others)]) - now)
        total: dict[Selection, float] = defaultdict(float)
        for (selection, _), gains in self._gain.items():
            total[selection] += statistics.median(gains)
        return dict(total)


@contextlib.contextmanager
def _hooks(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fastest(times: Mapping[Computation, list[float]]) -> Computation:
    return min(times, key=lambda way: statistics.median(times[way]))


def _seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    return _since(start, function())


def _since(start: float, output: Tensor) -> float:
    if output.is_cuda:
        torch.cuda.synchronize(output.device)
    return time.perf_counter() - start
