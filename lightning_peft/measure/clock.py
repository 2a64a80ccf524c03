"""How long calls take and how much memory they need, of several networks in one run."""

from __future__ import annotations

import contextlib
import gc
import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.baking.plain_network import Inputs, call


@dataclass(frozen=True)
class Latency:
    """Durations of single calls, in the order they ran.

    Attributes:
        batch_size: Samples in a call.
        seconds: Duration of each.
    """

    batch_size: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the calls was faster than the first, a quarter slower than the second."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def waiter(device: torch.device) -> Callable[[], None]:
    """Return what waits until a device has done its work; nothing on the CPU, which has when a call returns."""
    if device.type != "cuda":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)


@torch.no_grad()
def time_calls(
    networks: Mapping[str, nn.Module], inputs: Sequence[Inputs], *, runs: int, warm_up: int, wait: Callable[[], None]
) -> dict[str, tuple[float, ...]]:
    """Time calls of networks in turn, so that whatever else the machine does meets all of them alike.

    Args:
        networks: The networks; who goes first changes from round to round.
        inputs: What to call them with, in turn: work may depend on it. All networks see the same in a round.
        runs: Timed calls of each.
        warm_up: Calls of each before that.
        wait: See :func:`waiter`.

    Returns:
        Seconds of each call, by name.
    """
    names = list(networks)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for run in range(warm_up):
        for name in names:
            call(networks[name], inputs[run % len(inputs)])
    with _no_collection():
        for run in range(runs):
            for name in names if run % 2 == 0 else reversed(names):
                wait()
                start = time.perf_counter()
                call(networks[name], inputs[run % len(inputs)])
                wait()
                taken[name].append(time.perf_counter() - start)
    return {name: tuple(seconds) for name, seconds in taken.items()}


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operators make, and the most bytes of them that were alive at once.

    Workspace inside a kernel, and what the allocator keeps for later, are not seen.

    Attributes:
        peak: Most bytes alive after an operator.

    Example:
        >>> with LiveBytes() as live:
        ...     _ = (torch.zeros(4) + 1) * 2
        >>> live.peak  # two results of 16 bytes are alive during an operator
        32
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and look at what is alive after it."""
        given = {leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves((args, kwargs)) if _has_storage(leaf)}
        output = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
        for leaf in pytree.tree_leaves(output):
            if not _has_storage(leaf):
                continue
            storage = leaf.untyped_storage()
            # A view or a result in place of somebody else's memory, such as a weight's, is nothing new.
            if storage._cdata not in given:
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._live[storage._cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return output


def _has_storage(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.device.type != "meta"


@torch.no_grad()
def activation_bytes(network: nn.Module, inputs: Inputs, device: torch.device) -> int:
    """Return the most bytes that one call needs beside weights and inputs.

    On CUDA that is what PyTorch's allocator gave out, workspaces included; on the CPU the tensors alive after an operator.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(network, inputs)
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    live = LiveBytes()
    with live:
        call(network, inputs)
    return live.peak


def file_bytes(network: nn.Module) -> int:
    """Return the size of the network's state dict as ``torch.save`` writes it; zeros take the same space as other values."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.tell()
