"""Measuring what a network costs where it is used, alone or beside another one in the same run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn

from lightning_peft.baking.plain_network import Inputs, batch_size, plain_network, with_batch_size
from lightning_peft.measure.clock import Latency, activation_bytes, file_bytes, time_calls, waiter
from lightning_peft.measure.figures import Comparison, Figures
from lightning_peft.measure.layers import count_flops, layer_costs, time_layers
from lightning_peft.measure.quality import judge, moved
from lightning_peft.namespaces import both
from lightning_peft.weights.mapped_layer import is_mapped


def measure(
    network: nn.Module,
    inputs: Inputs | list[Inputs],
    *,
    batch_sizes: Sequence[int] | None = None,
    runs: int = 30,
    warm_up: int = 5,
) -> Figures:
    """Measure one network on the device it is on, in evaluation mode; it is left as it was.

    Args:
        network: A LightningModule or a network; one under weight maps is measured as it would be baked.
        inputs: What the network is called with (tensor, tuple of positional or mapping of keyword arguments), or a list of
            such samples for networks whose work depends on the input.
        batch_sizes: Batch sizes to time, samples repeated or cut to fit; by default that of the first sample.
        runs: Timed calls.
        warm_up: Calls before that.

    Raises:
        MisconfigurationException: No network or no batch is found, or a count is not positive.
    """
    (figures,) = _measured({"": network}, inputs, batch_sizes, runs, warm_up)
    return figures


def compare(
    networks: Mapping[str, nn.Module],
    inputs: Inputs | list[Inputs],
    batches: Iterable[Any] | None,
    *,
    batch_sizes: Sequence[int] | None,
    runs: int,
    warm_up: int,
) -> Comparison:
    """Measure two networks in one run, calls in turn.

    Args:
        networks: The two, by what to call them.
        inputs: As for :func:`measure`.
        batches: Labelled batches for accuracy and calibration: pairs of inputs and class indices, or mappings with
            ``labels``.
        batch_sizes: As for :func:`measure`.
        runs: As for :func:`measure`.
        warm_up: As for :func:`measure`.

    Raises:
        MisconfigurationException: As :func:`measure`; or they are on different devices, or batches have no labels.
    """
    one, other = _measured(networks, inputs, batch_sizes, runs, warm_up)
    before, after = networks.values()
    quality = None
    if batches is not None:
        kept = list(batches)  # an iterator gives its batches once
        with _ready(before) as (first, device), _ready(after) as (second, _):
            quality = (judge(first, kept, device), judge(second, kept, device))
    return Comparison(one, other, runs, warm_up, quality, (*networks,))  # type: ignore[arg-type]


def _measured(
    modules: Mapping[str, nn.Module],
    inputs: Inputs | list[Inputs],
    batch_sizes: Sequence[int] | None,
    runs: int,
    warm_up: int,
) -> list[Figures]:
    samples = inputs if isinstance(inputs, list) else [inputs]
    sizes = [batch_size(samples[0])] if samples and not batch_sizes else list(batch_sizes or ())
    if not samples or runs < 1 or warm_up < 0 or any(size < 1 for size in sizes):
        raise MisconfigurationException("Measuring needs at least one sample, runs >= 1, warm_up >= 0 and batch sizes >= 1.")
    with contextlib.ExitStack() as stack:
        ready = {name: stack.enter_context(_ready(module)) for name, module in modules.items()}
        devices = {device for _, device in ready.values()}
        if len(devices) > 1:
            raise MisconfigurationException(
                f"The networks are on {' and '.join(map(str, devices))}. Move them to one device first."
            )
        (device,) = devices
        samples = [moved(sample, device) for sample in samples]
        networks = {name: network for name, (network, _) in ready.items()}
        taken: dict[str, list[Latency]] = {name: [] for name in networks}
        for size in sizes:
            resized = [with_batch_size(sample, size) for sample in samples]
            seconds = time_calls(networks, resized, runs=runs, warm_up=warm_up, wait=waiter(device))
            for name, values in seconds.items():
                taken[name].append(Latency(size, values))
        return [_figures(network, samples, taken[name], device) for name, network in networks.items()]


def _figures(network: nn.Module, samples: list[Inputs], latencies: list[Latency], device: torch.device) -> Figures:
    counts = [count_flops(network, sample) for sample in samples]
    shares = time_layers(network, samples[0], 5, waiter(device))
    parameters = list(network.parameters())
    return Figures(
        parameters=sum(parameter.numel() for parameter in parameters),
        nonzero=sum(int(parameter.count_nonzero()) for parameter in parameters),
        weight_bytes=sum(tensor.nbytes for tensor in (*parameters, *network.buffers())),
        file_bytes=file_bytes(network),
        batch_size=batch_size(samples[0]),
        flops=tuple(count.total / batch_size(sample) for count, sample in zip(counts, samples, strict=True)),
        activation_bytes=max(activation_bytes(network, sample, device) for sample in samples),
        latencies=tuple(latencies),
        layers=layer_costs(network, counts, shares),
        unknown=tuple(sorted(frozenset().union(*(count.unknown for count in counts)))),
        device=_words(device),
    )


@contextlib.contextmanager
def _ready(module: nn.Module) -> Iterator[tuple[nn.Module, torch.device]]:
    """Put a network into evaluation mode for a while; a LightningModule's, or one under maps or parts, is copied and baked."""
    if isinstance(module, both(LightningModule)) or any(map(is_mapped, module.modules())):
        module = plain_network(module)
    if any(isinstance(parameter, torch.sparse.SparseSemiStructuredTensor) for parameter in module.parameters()):
        raise MisconfigurationException(
            "Layers of this network are packed by semi_structured, and packed weights can be neither counted nor saved. "
            "Measure it before packing; lightning_peft.measure.clock.time_calls times packed ones."
        )
    training = [part for part in module.modules() if part.training]
    module.eval()
    tensors = [*module.parameters(), *module.buffers()]
    try:
        yield module, tensors[0].device if tensors else torch.device("cpu")
    finally:
        for part in training:
            part.training = True


def _words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() != 1 else ''}"
