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


def is_split(tensor: Any) -> bool:
    """Whether layers compute with a tensor as it is spread, each process with its part: Lightning's tensor parallelism."""
    return is_shard(tensor) and tensor.device_mesh.mesh_dim_names == ("tensor_parallel",)


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
    if is_shard(value) and value.device_mesh != stored.device_mesh:
        value = whole(value)
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


def by_parts(function: Callable[..., Tensor], tensor: Any, *others: Any) -> Any:
    """Apply a function, where its first argument is spread over processes to the part that each of them has.

    Args:
        function: Returns a tensor of the shape of its first argument, of which every element follows from elements that one
            process has.
        tensor: Its first argument.
        *others: Its other ones: shards alike, tensors that every process has whole on the same mesh, anything else.
    """
    if not is_shard(tensor):
        return function(tensor, *others)
    from torch.distributed.tensor import DTensor

    part = function(tensor.to_local(), *(_beside(tensor, other) for other in others))
    layout: dict[str, Any] = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, **layout)


def _beside(tensor: Any, other: Any) -> Any:
    """What a process computes with beside its part of a tensor; gradients of what all have whole are summed over parts."""
    if not is_shard(other) or other.placements == tensor.placements:
        return other.to_local() if is_shard(other) else other
    from torch.distributed.tensor import Partial, Replicate

    return other.to_local(grad_placements=[Partial() if place.is_shard() else Replicate() for place in tensor.placements])


def cuts(tensor: Any, dim: int, size: int) -> bool:
    """Whether one of the groups of ``size`` neighbours along a dimension of a split tensor has members in two processes."""
    if not any(place.is_shard(dim % tensor.ndim) for place in tensor.placements):
        return False
    part = -(-tensor.shape[dim] // tensor.device_mesh.size())  # as torch deals out what does not divide
    return bool(part % size)


def replicate(module: nn.Module, like: Any) -> None:
    """Let every process on the mesh of a tensor have the tensors of a module whole, equal, and as part of that mesh.

    Args:
        module: The module; what is on a mesh stays.
        like: The tensor.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    everywhere = [Replicate()] * like.device_mesh.ndim
    for held, name, stored in _held(module.modules()):
        if not is_shard(stored):
            spread: Any = distribute_tensor(stored.detach(), like.device_mesh, everywhere)
            held[name] = nn.Parameter(spread, stored.requires_grad) if isinstance(stored, nn.Parameter) else spread


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
    every = dict.fromkeys(each for module in modules for each in module.modules())  # ranks gather in one order
    swapped = [(held, name, stored) for held, name, stored in _held(every) if is_shard(stored)]
    for held, name, stored in swapped:
        held[name] = make(stored)
    try:
        yield
    finally:
        for held, name, stored in swapped:
            held[name] = stored


def _held(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The tensors of modules, each with where it is held."""
    for each in modules:
        for held in (each._parameters, each._buffers):
            yield from ((held, name, tensor) for name, tensor in list(held.items()) if tensor is not None)
