"""The cost of each layer of a network in one call: a running count, charged to the innermost module at work."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_peft.baking.plain_network import Inputs, call
from lightning_peft.measure.flop_count import FlopCount


@dataclass(frozen=True)
class LayerCost:
    """A module with weights or work of its own; what its submodules have is theirs.

    Attributes:
        name: Qualified name, empty for the network itself.
        kind: Class name.
        shape: Shape of its weight, empty without one.
        parameters: Values of its own parameters.
        nonzero: How many of them are not zero.
        flops: Floating point operations of its own in one call, mean over the samples.
        share: Share of the time of a call.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    nonzero: int
    flops: float
    share: float


@contextlib.contextmanager
def charged(network: nn.Module, read: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Charge what a running count grows by to the module at work.

    Args:
        network: Module whose calls are watched.
        read: Returns the count so far, such as FLOPs or seconds.

    Yields:
        What was charged so far, by qualified name.
    """
    own: dict[str, float] = defaultdict(float)
    at_work: list[str] = []
    last = 0.0
    handles = []

    def settle() -> None:
        nonlocal last
        now = read()
        if at_work:
            own[at_work[-1]] += now - last
        last = now

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            settle()
            at_work.append(name)

        return hook

    def leave(*_: Any) -> None:
        settle()
        at_work.pop()

    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield own
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def unfused_attention() -> Iterator[None]:
    """Turn off PyTorch's fused transformer layers, which hide their products from a count."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class Counted:
    """FLOPs of one call, by module, and the operators that could not be counted."""

    by_layer: dict[str, float]
    unknown: frozenset[str]

    @property
    def total(self) -> float:
        """FLOPs of the call."""
        return sum(self.by_layer.values())


@torch.no_grad()
def count_flops(network: nn.Module, inputs: Inputs) -> Counted:
    """Count the floating point operations that run for these inputs, as :class:`FlopCount` does.

    What a gate skips is not counted; what a mask sets to zero is, since a dense product computes it.

    Example:
        >>> count_flops(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), torch.ones(2, 3)).by_layer["0"]
        60.0
    """
    with unfused_attention(), FlopCount() as count, charged(network, lambda: float(count.total)) as own:
        call(network, inputs)
    return Counted(dict(own), frozenset(count.unknown))


@torch.no_grad()
def time_layers(network: nn.Module, inputs: Inputs, runs: int, wait: Callable[[], None]) -> dict[str, float]:
    """Return the share of each module in the time of calls; watching costs time too, so shares are all this is good for."""

    def clock() -> float:
        wait()
        return time.perf_counter()

    call(network, inputs)
    with charged(network, clock) as own:
        for _ in range(runs):
            call(network, inputs)
    total = sum(own.values()) or 1.0
    return {name: seconds / total for name, seconds in own.items()}


def layer_costs(network: nn.Module, counts: list[Counted], shares: dict[str, float]) -> tuple[LayerCost, ...]:
    """Put together what is known of each module; those with neither weights nor FLOPs become one, called ``(other)``."""
    rows, rest, seen = [], 0.0, set()
    for name, module in network.named_modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None and id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        flops = sum(count.by_layer.get(name, 0.0) for count in counts) / max(len(counts), 1)
        share = shares.get(name, 0.0)
        if not own and not flops:
            rest += share
            continue
        weight = module._parameters.get("weight")
        rows.append(
            LayerCost(
                name=name,
                kind=type(module).__name__,
                shape=() if weight is None else tuple(weight.shape),
                parameters=sum(parameter.numel() for parameter in own),
                nonzero=sum(int(parameter.count_nonzero()) for parameter in own),
                flops=flops,
                share=share,
            )
        )
    return (*rows, LayerCost("(other)", "", (), 0, 0, 0.0, rest))
