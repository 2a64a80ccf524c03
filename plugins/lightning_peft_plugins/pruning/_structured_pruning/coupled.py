"""Units (channels, heads) that leave several tensors at once, and the edit that removes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.structure.ranges import ranges
from lightning_peft.structure.slices import slice_entry
from lightning_peft.weights.maps import plain_tensors

Kind = Literal["channels", "heads"]


@dataclass(frozen=True)
class UnitPlace:
    """A dimension of a tensor in which units have coordinates.

    Attributes:
        tensor: Qualified name.
        dim: The dimension.
        units: Unit of each of its coordinates, -1 for those that belong to none; shape ``(size,)``.
        scored: Whether its values say how much a unit matters: weights of layers do, biases and statistics do not.
        written: Whether the layer makes the units with it; others read them, or pass them on.
    """

    tensor: str
    dim: int
    units: Tensor
    scored: bool = False
    written: bool = False


@dataclass(frozen=True)
class UnitCount:
    """A number a layer notes that falls with the units.

    Attributes:
        path: Qualified name of the layer.
        attribute: The attribute; of a tuple the last entry falls.
        units: Unit of each thing it counts, -1 for those that belong to none.
    """

    path: str
    attribute: str
    units: Tensor


@dataclass(frozen=True)
class Coupled:
    """Units that can be removed one by one, each from every tensor that holds a part of it.

    Attributes:
        name: Qualified name of the layer that makes them.
        kind: What they are.
        units: Their number.
        places: Where they are.
        numbers: What counts them.
    """

    name: str
    kind: Kind
    units: int
    places: Sequence[UnitPlace]
    numbers: Sequence[UnitCount]

    def under(self, prefix: str) -> Coupled:
        """The same group by its names in a module that holds the network as ``prefix``."""
        if not prefix:
            return self
        places = [replace(place, tensor=f"{prefix}.{place.tensor}") for place in self.places]
        numbers = [replace(number, path=f"{prefix}.{number.path}") for number in self.numbers]
        return replace(self, name=f"{prefix}.{self.name}", places=places, numbers=numbers)


def cut_edit(module: nn.Module, path: str, cuts: Sequence[tuple[Coupled, Tensor]]) -> dict[str, Any]:
    """Describe the removal of units.

    Args:
        module: The module whose names the groups use.
        path: Qualified name of the network in it, for messages.
        cuts: Groups, each with the units that go, in any order.

    Returns:
        A slice (:mod:`lightning_peft.structure.slices`), plain data.
    """
    tensors = plain_tensors(module)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    gone: dict[str, dict[int, Tensor]] = {}
    attributes: dict[str, dict[str, list[Any]]] = {}
    for group, units in cuts:
        if not len(units):
            continue
        for place in group.places:
            name = names[id(tensors[place.tensor])][0]  # a tied tensor is cut once
            out, dims = torch.isin(place.units, units), gone.setdefault(name, {})
            dims[place.dim] = out | dims[place.dim] if place.dim in dims else out
        for number in group.numbers:
            noted = attributes.setdefault(number.path, {})
            value = getattr(module.get_submodule(number.path), number.attribute)
            old, new = noted.get(number.attribute, [value, value])
            noted[number.attribute] = [old, _less(new, int(torch.isin(number.units, units).sum()))]
    entries = {}
    for name, dims in gone.items():
        kept = {dim: ranges((~out).nonzero().flatten().tolist()) for dim, out in dims.items() if bool(out.any())}
        if kept:
            entries[name] = slice_entry(list(tensors[name].shape), kept, names[id(tensors[name])][1:])
    plain = {layer: {key: _plain(pair) for key, pair in pairs.items()} for layer, pairs in attributes.items()}
    return {"op": "slice", "path": path, "tensors": entries, "attributes": plain}


def _less(value: Any, count: int) -> Any:
    return (*value[:-1], value[-1] - count) if isinstance(value, tuple) else value - count


def _plain(pair: Sequence[Any]) -> list[Any]:
    return [list(value) if isinstance(value, tuple) else value for value in pair]


def scores(groups: Sequence[Coupled], values: Mapping[str, Tensor]) -> list[Tensor]:
    """Score the units of each group: the sum over each weight, the mean over weights, relative to the group's own mean.

    It is Torch-Pruning's group importance (Fang et al., DepGraph, CVPR 2023): ``I_u = mean over places of the sum over the
    coordinates of u``, divided by the mean of ``I`` over the group, so that groups of different sizes can be ranked together.

    Args:
        groups: The groups.
        values: Number per weight, not negative, by name of the tensor.

    Returns:
        One vector a group, float64 on the CPU so that every machine decides alike; a group of zeros scores zero.
    """
    return [_score(group, values) for group in groups]


def _score(group: Coupled, values: Mapping[str, Tensor]) -> Tensor:
    total, count = torch.zeros(group.units, dtype=torch.float64), 0
    for place in group.places:
        if not place.scored:
            continue
        sums = values[place.tensor].double().movedim(place.dim, 0).reshape(len(place.units), -1).sum(1).cpu()
        held = place.units >= 0
        total.index_add_(0, place.units[held], sums[held])
        count += 1
    total /= max(count, 1)
    mean = total.mean()
    return total / mean if mean > 0 else total
