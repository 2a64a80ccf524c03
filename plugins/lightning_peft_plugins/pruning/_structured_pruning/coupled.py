"""The edit that removes units (channels, heads) from several tensors at once, and what each of them is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.structure.coupled.units import Coupled
from lightning_peft.structure.ranges import ranges
from lightning_peft.structure.slices import slice_entry
from lightning_peft.weights.maps import plain_tensors


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
