"""Slice edits: networks that lose channels, heads or hidden units, while every name stays.

An edit says for each tensor which coordinates of which dimension stay, and for each layer the numbers it notes about them.
Parameters stay the same objects, so optimizers and ties hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_peft.structure.axes import NEW, OLD
from lightning_peft.structure.bounds import check_bounds
from lightning_peft.structure.edit_types import Recorded, SliceEdit, SliceEntry
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.in_place import check_attributes, is_changes, put, set_attributes
from lightning_peft.structure.part_slices import check_parts, put_parts
from lightning_peft.structure.ranges import Ranges, are_ranges, complement, indices
from lightning_peft.weights.held import HeldMask
from lightning_peft.weights.maps import WeightMap, mapped_tensors, plain_tensors

Cut: TypeAlias = dict[str, list[Tensor]]
"""What left each tensor, by name: one part for each dimension that was cut, in order, on the CPU."""


def slice_entry(shape: Sequence[int], kept: Mapping[int, Ranges], tied: Sequence[str] = ()) -> SliceEntry:
    """Describe the cut of one tensor.

    Args:
        shape: Its shape.
        kept: Coordinates that stay, by dimension; other dimensions stay whole.
        tied: Other names of the tensor.

    Example:
        >>> slice_entry([4, 3], {0: [[0, 1], [3, 4]]})
        {'from': [4, 3], 'to': [2, 3], 'kept': [[[0, 1], [3, 4]], None]}
    """
    sizes = [sum(stop - start for start, stop in kept[dim]) if dim in kept else size for dim, size in enumerate(shape)]
    parts = [[list(part) for part in kept[dim]] if dim in kept else None for dim in range(len(shape))]
    entry: SliceEntry = {"from": list(shape), "to": sizes, "kept": parts}
    if tied:
        entry["tied"] = list(tied)
    return entry


def check_slice(module: nn.Module, edit: Recorded) -> None:
    """Refuse an edit that does not fit, before anything is touched.

    Raises:
        CheckpointError: It is malformed, or was made on a module with other shapes, numbers or ties.
    """
    _check_form(edit)
    tensors = plain_tensors(module)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for name, entry in edit["tensors"].items():
        if name not in tensors or list(tensors[name].shape) != entry["from"]:
            now = f"has {list(tensors[name].shape)}" if name in tensors else "has no such tensor"
            raise CheckpointError(
                f"A cut was made in {name} of shape {entry['from']}; this {type(module).__name__} {now}. Build the model with "
                "the arguments it was trained with."
            )
        if sorted(names[id(tensors[name])]) != sorted([name, *entry.get("tied", ())]):
            raise CheckpointError(
                f"A cut was made in {name} when it was tied to {entry.get('tied', [])}; now it stands under "
                f"{names[id(tensors[name])]}. Tie tensors as they were."
            )
    for path, changes in edit["attributes"].items():
        check_attributes(module, path, changes)
    check_bounds(module, edit)
    for name, weight_maps in _maps(module, edit).items():
        for weight_map in weight_maps:
            _check_map(weight_map, name, edit["tensors"][name])
    check_parts(module, edit)


def _check_form(edit: Recorded) -> None:
    tensors, attributes = edit.get("tensors"), edit.get("attributes")
    fits = (
        isinstance(edit.get("path"), str)
        and isinstance(tensors, dict)
        and all(isinstance(name, str) and _is_entry(entry) for name, entry in tensors.items())
        and isinstance(attributes, dict)
        and all(isinstance(path, str) and is_changes(changes, (int, list)) for path, changes in attributes.items())
    )
    if not fits:
        raise CheckpointError(
            "A recorded cut is malformed: it needs 'path', 'tensors' and 'attributes', with ranges of coordinates that are in "
            "order, lie within the old shape and make the new one."
        )


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    parts: list[Any] = [entry.get(key, [] if key == "tied" else None) for key in ("from", "to", "kept", "tied")]
    if not all(isinstance(part, list) for part in parts):
        return False
    old, new, kept, tied = parts
    if not len(old) == len(new) == len(kept):
        return False
    if not all(type(size) is int and size > 0 for size in [*old, *new]) or not all(isinstance(name, str) for name in tied):
        return False
    return all(
        before == after
        if part is None
        else are_ranges(part, before) and sum(stop - start for start, stop in part) == after < before
        for before, after, part in zip(old, new, kept, strict=True)
    )


@torch.no_grad()
def cut(module: nn.Module, edit: SliceEdit) -> Cut:
    """Make a checked cut.

    Returns:
        What left, for :func:`mend`.
    """
    tensors, left = plain_tensors(module), {}
    weight_maps = _maps(module, edit)

    def narrowed(name: str, value: Tensor, entry: Mapping[str, Any]) -> Tensor:
        left[name] = _left(value, entry["kept"])
        return narrow(value, entry["kept"])

    put_parts(module, edit, narrowed)
    for name, entry in edit["tensors"].items():
        for weight_map in weight_maps.get(name, ()):
            _narrow_map(weight_map, entry)
        put(module, name, tensors[name], narrowed(name, tensors[name].detach(), entry))
    set_attributes(module, edit["attributes"], NEW)
    return left


@torch.no_grad()
def mend(module: nn.Module, edit: SliceEdit, left: Cut) -> None:
    """Undo a cut: what stayed keeps the values it has now, what left comes back as it was.

    A cut made in another process has nothing at hand: zeros take its place, for a checkpoint to fill.
    """
    tensors, weight_maps = plain_tensors(module), _maps(module, edit)
    put_parts(module, edit, lambda name, value, entry: _widen(value, entry, left.get(name)))
    for name, entry in edit["tensors"].items():
        for weight_map in weight_maps.get(name, ()):
            if isinstance(weight_map, HeldMask) and list(weight_map.held.shape) == entry["to"]:
                # A mask of the smaller tensor says nothing of what comes back, which is live until the next choice.
                weight_map.hold(_widen(weight_map.held, entry, None, fill=True))
        put(module, name, tensors[name], _widen(tensors[name].detach(), entry, left.get(name)))
    set_attributes(module, edit["attributes"], OLD)


def narrow(value: Tensor, kept: Sequence[Ranges | None]) -> Tensor:
    """Leave only the coordinates that stay.

    Args:
        value: Any tensor.
        kept: Ranges for each dimension, ``None`` for a whole one.

    Example:
        >>> narrow(torch.arange(6).view(2, 3), [None, [[1, 3]]])
        tensor([[1, 2],
                [4, 5]])
    """
    for dim, part in enumerate(kept):
        if part is not None:
            value = value.index_select(dim, indices(part).to(value.device))
    return value


def _left(value: Tensor, kept: Sequence[Ranges | None]) -> list[Tensor]:
    """What each dimension loses, of what the dimensions before it have kept; together no more than what is cut."""
    parts = []
    for dim, part in enumerate(kept):
        if part is not None:
            rest = complement(part, value.shape[dim]).to(value.device)
            parts.append(value.index_select(dim, rest).to("cpu" if not value.is_meta else "meta"))
            value = value.index_select(dim, indices(part).to(value.device))
    return parts


def _widen(value: Tensor, entry: SliceEntry, left: Sequence[Tensor] | None, fill: float = 0.0) -> Tensor:
    cut_dims = [(dim, part) for dim, part in enumerate(entry["kept"]) if part is not None]
    for place, (dim, part) in reversed(list(enumerate(cut_dims))):
        size = entry["from"][dim]
        shape = [*value.shape[:dim], size, *value.shape[dim + 1 :]]
        whole = value.new_full(shape, fill).index_copy_(dim, indices(part).to(value.device), value)
        if left is not None:
            whole.index_copy_(dim, complement(part, size).to(value.device), left[place].to(value))
        value = whole
    return value


def _maps(module: nn.Module, edit: Recorded) -> dict[str, list[WeightMap]]:
    """Weight maps on the tensors of an edit, by name."""
    return {mapped.name: mapped.maps for mapped in mapped_tensors(module) if mapped.name in edit["tensors"]}


def _check_map(weight_map: WeightMap, name: str, entry: SliceEntry) -> None:
    own = {key: tensor for key, tensor in weight_map.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    sized = [key for key, tensor in own.items() if tensor.numel() > 1 and not key.endswith("_extra_state")]
    if sized:
        raise CheckpointError(
            f"{name} should be cut from {entry['from']} to {entry['to']}, but the weight map {weight_map.kind!r} of "
            f"{weight_map.owner} keeps {sized[0]} of shape {tuple(own[sized[0]].shape)} for its old size. Leave the layer "
            "out of one of the two methods with exclude=, or bake first and prune in a fit of its own."
        )


def _narrow_map(weight_map: WeightMap, entry: SliceEntry) -> None:
    """Cut masks and other plain attributes of the tensor's shape with the tensor."""
    if isinstance(weight_map, HeldMask):
        if list(weight_map.held.shape) == entry["from"]:
            weight_map.hold(narrow(weight_map.held, entry["kept"]))
        return
    for key, value in vars(weight_map).items():
        if isinstance(value, Tensor) and list(value.shape) == entry["from"]:
            setattr(weight_map, key, narrow(value, entry["kept"]))
