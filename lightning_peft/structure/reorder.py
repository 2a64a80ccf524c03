"""Other orders of coordinates: a module that computes the same with its channels in other places.

No name, shape or number changes, so a checkpoint needs no journal to be loaded: its tensors are in the new order, and fit any
module of the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.structure.coupled.units import Coupled
from lightning_peft.structure.width_state import state_dims
from lightning_peft.weights.held import HeldMask
from lightning_peft.weights.maps import mapped_tensors, plain_tensors, split_name
from lightning_peft.weights.parts import placed_parts
from lightning_peft.weights.weight_map import WeightMap

Orders: TypeAlias = Mapping[str, Mapping[int, Tensor]]
"""Old coordinate of every new one, by dimension, by qualified name of the tensor; of tied names one."""


def unit_order(units: Tensor, order: Tensor) -> Tensor:
    """Order of the coordinates of a dimension whose units change places.

    Args:
        units: Unit of every coordinate, -1 for those that belong to none and stay.
        order: Old unit of every new one.

    Returns:
        Old coordinate of every new one.

    Raises:
        ValueError: Some units have more coordinates than others.

    Example:
        >>> unit_order(torch.tensor([0, 0, 1, 1, -1]), torch.tensor([1, 0]))
        tensor([2, 3, 0, 1, 4])
    """
    counts = torch.bincount(units[units >= 0], minlength=len(order))
    if len(set(counts.tolist())) > 1:
        raise ValueError("some units have more coordinates than others")
    places = units.argsort(stable=True)[int((units < 0).sum()) :].view(len(order), -1)
    index = torch.arange(len(units))
    index[places.flatten()] = places[order].flatten()
    return index


def group_orders(module: nn.Module, found: Mapping[str, tuple[Coupled, Tensor]]) -> dict[str, dict[int, Tensor]]:
    """What the order of the units of groups means for each tensor.

    Args:
        module: The module whose names the groups use.
        found: Groups and the order of each, by any key.
    """
    tensors = plain_tensors(module)
    names: dict[int, str] = {}
    orders: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    for group, order in found.values():
        for place in group.places:
            dims = orders.setdefault(names[id(tensors[place.tensor])], {})
            index = unit_order(place.units, order)
            dims[place.dim] = dims[place.dim][index] if place.dim in dims and not _same(dims[place.dim], index) else index
    return orders


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one == other).all())


@torch.no_grad()
def reorder(module: nn.Module, orders: Orders) -> None:
    """Put coordinates of tensors, and of the masks on them, into another order, in place."""
    tensors = plain_tensors(module)
    for name, dims in orders.items():
        tensors[name].data.copy_(reordered(tensors[name].detach(), dims))
    for mapped in mapped_tensors(module):
        for weight_map in mapped.maps if mapped.name in orders else ():
            if isinstance(weight_map, HeldMask) and weight_map.holds(mapped.stored):
                weight_map.hold(reordered(weight_map.held, orders[mapped.name]))


def reordered(value: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """A tensor with its coordinates in another order.

    Example:
        >>> reordered(torch.tensor([[1, 2, 3]]), {1: torch.tensor([2, 0, 1])})
        tensor([[3, 1, 2]])
    """
    for dim, order in dims.items():
        value = value.index_select(dim, order.to(value.device))
    return value


def reordered_state(state: Mapping[str, object], shape: list[int], dims: Mapping[int, Tensor], name: str) -> dict[str, Tensor]:
    """What an optimizer keeps about a parameter, in the parameter's new order.

    Args:
        state: ``optimizer.state[parameter]``.
        shape: Shape of the parameter.
        dims: Its orders.
        name: Its name, for messages.

    Returns:
        The tensors that change.

    Raises:
        MisconfigurationException: A state has a shape that is not known, or is no tensor but holds some.
    """
    found = {}
    for key, value in state.items():
        if isinstance(value, (list, tuple, dict)) and value:
            raise MisconfigurationException(
                f"The optimizer keeps a {type(value).__name__} {key!r} for {name}, whose channels cannot change places under "
                "it. Use an optimizer with one state for each parameter (SGD, Adam), or leave the order of channels as it is."
            )
        if isinstance(value, Tensor):
            at = state_dims(value, shape, key)
            own = {place: dims[dim] for place, dim in enumerate(at) if dim is not None and dim in dims}
            if own:
                found[key] = reordered(value, own)
    return found


def fixed_by(module: nn.Module, group: Coupled) -> str | None:
    """Say why the units of a group cannot change places, because something keeps numbers for single channels of its tensors."""
    tensors = {place.tensor for place in group.places}
    paths = {split_name(name)[0] for name in tensors}
    for placed in placed_parts(module, every_name=True):
        if placed.path in paths:
            return f"{placed.path} has the layer part {placed.part.kind!r} of {placed.part.owner} beside it"
    for mapped in mapped_tensors(module, every_name=True):
        for weight_map in mapped.maps if mapped.name in tensors else ():
            if _is_sized(weight_map):
                return f"the map {weight_map.kind!r} of {weight_map.owner} keeps numbers for single channels of {mapped.name}"
    return None


def _is_sized(weight_map: WeightMap) -> bool:
    if isinstance(weight_map, HeldMask):
        return False
    own = [*weight_map.state_dict(keep_vars=True).values(), *vars(weight_map).values()]
    return any(isinstance(value, Tensor) and value.numel() > 1 for value in own)
