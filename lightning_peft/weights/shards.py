"""Whole tensors in place of shards, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is spread over processes, as ``fully_shard`` leaves parameters between steps."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """Return a tensor with all that other processes hold of it; every process has to ask. Anything else comes back as it is."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def spread_as(stored: Any, value: Any) -> Any:
    """Return a tensor spread as a stored one is, or whole where that is.

    Args:
        stored: A parameter, of which nothing else is looked at.
        value: Shards, or a whole tensor that is the same in every process; anything else comes back as it is.
    """
    if not is_shard(stored):
        return whole(value)
    if is_shard(value):
        return value if value.placements == stored.placements else value.redistribute(placements=stored.placements)
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * stored.device_mesh.ndim
    spread = DTensor.from_local(value.to(stored.device), stored.device_mesh, everywhere, run_check=False)
    return spread.redistribute(placements=stored.placements)


@contextmanager
def opened(tensor: Tensor) -> Iterator[Tensor]:
    """Give a tensor whole, to be changed in place; what is spread over processes is changed there when the block ends.

    Args:
        tensor: Shards or a whole tensor, such as what an optimizer keeps of a parameter; every process has to ask.

    Example:
        >>> moments = torch.zeros(2)
        >>> with opened(moments) as full:
        ...     full[1] = 1
        >>> moments
        tensor([0., 1.])
    """
    full: Tensor = whole(tensor.detach())
    yield full
    if is_shard(tensor):
        with torch.no_grad():
            tensor.copy_(spread_as(tensor, full))


def empty_shards(module: nn.Module) -> Callable[[torch.Size, torch.dtype], Tensor]:
    """Return how to make tensors that are spread as a module's parameters are; those without dimensions are whole."""
    from torch.distributed.tensor import Shard, empty

    first: Any = next(each for each in module.parameters() if is_shard(each))
    mesh, spread = first.device_mesh, [Shard(0) if placement.is_shard() else placement for placement in first.placements]

    def make(size: torch.Size, dtype: torch.dtype) -> Tensor:
        return empty(size, dtype=dtype, device_mesh=mesh, placements=spread) if size else torch.empty(size, dtype=dtype)

    return make


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Let modules hold their parameters whole; what is changed in them meanwhile is changed in the shards.

    Args:
        *modules: Layers, maps, parts, with all that is within them.
    """
    made: list[tuple[Any, Tensor, int]] = []

    def parameter(stored: Any) -> nn.Parameter:
        full = nn.Parameter(whole(stored.detach()), requires_grad=stored.requires_grad)
        made.append((stored, full, full._version))
        return full

    with _swapped(modules, parameter):
        yield
    with torch.no_grad():
        for stored, full, version in made:
            if full._version != version:
                stored.copy_(spread_as(stored, full.detach()))


@contextmanager
def read_whole(*modules: nn.Module) -> Iterator[None]:
    """Let modules answer with whole tensors, whose gradients reach the shards."""
    with _swapped(modules, whole):
        yield


@contextmanager
def _swapped(modules: Iterable[nn.Module], make: Callable[[Any], Any]) -> Iterator[None]:
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    for each in dict.fromkeys(each for module in modules for each in module.modules()):  # ranks gather in one order
        for name, stored in each._parameters.items():
            if is_shard(stored):
                swapped.append((each._parameters, name, stored))
                each._parameters[name] = make(stored)
    try:
        yield
    finally:
        for parameters, name, stored in swapped:
            parameters[name] = stored
