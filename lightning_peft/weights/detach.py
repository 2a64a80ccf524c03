"""Taking weight maps and layer parts off a module, all of them or those that do not stay."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.compose.lanes import Lane
from lightning_peft.weights.attachment import Attachment
from lightning_peft.weights.map_modules import MapModules
from lightning_peft.weights.mapped_layer import MappedLayer, is_mapped, take_chain
from lightning_peft.weights.maps import MappedTensor, mapped_tensors
from lightning_peft.weights.parts import part_stacks, placed_parts, take_parts
from lightning_peft.weights.shards import gathered, spread_as, whole
from lightning_peft.weights.weight_map import WeightMap

Leave = Literal["baked", "live", "pristine", "unmasked"]


def attachments(module: nn.Module) -> list[Attachment]:
    """Return every weight map and layer part on a module."""
    maps = [weight_map for mapped in mapped_tensors(module) for weight_map in mapped.maps]
    return [*maps, *(placed.part for placed in placed_parts(module))]


@torch.no_grad()
def detach_maps(
    module: nn.Module, leave: Leave = "baked", *, parts: bool = True, stay: Collection[Attachment] = frozenset()
) -> None:
    """Take weight maps and layer parts off a module; parameter objects are as before, and classes where nothing stays.

    Args:
        module: The module.
        leave: Value the tensors keep: ``"baked"``, what the layers saw last (``"live"``), the same without masks
            (``"unmasked"``), or the value they had before the maps came (``"pristine"``; tensors loaded or trained since then
            keep their live value). Parts that can go into a weight do so, unless it is left as it was before they came.
        parts: Whether parts are taken off too.
        stay: Maps and parts that stay on; :func:`check_stay` has let them pass.
    """
    tensors = list(mapped_tensors(module))
    left = [mapped for mapped in tensors if any(weight_map not in stay for weight_map in mapped.maps)]
    values: dict[int, Tensor] = {}
    for mapped in left:
        stored = mapped.stored
        if id(stored) not in values:  # a tied tensor is mapped once
            with gathered(mapped.layer, *mapped.maps):
                value = _final_value(mapped, leave, stay)
            values[id(stored)] = spread_as(stored, value)
    if parts:
        _detach_parts(module, leave, values, stay)
    for mapped in tensors:
        for weight_map in mapped.maps:
            if weight_map not in stay:
                weight_map.detached()
        staying = [weight_map for weight_map in mapped.maps if weight_map in stay]
        if staying:
            mapped.chain.maps = staying
        else:  # the chain stays as it was, for whoever took a snapshot of the layer
            take_chain(mapped.layer, mapped.attribute)
        stored = mapped.stored
        if id(stored) in values:
            stored.copy_(values.pop(id(stored)))
    settle(module)
    if not attachments(module):
        MapModules.hide(module)


def settle(module: nn.Module) -> None:
    """Take what is on a module as where it stands from now on: there is no way back to before it came."""
    for mapped in mapped_tensors(module):
        mapped.chain.pristine, mapped.chain.version = None, mapped.stored._version
    for _, layer, stack in part_stacks(module):
        stack.pristine, stack.version = {}, stack.count(layer)


def _final_value(mapped: MappedTensor, leave: Leave, stay: Collection[Attachment]) -> Tensor:
    if leave == "pristine" and mapped.untouched:
        pristine = mapped.chain.pristine
        return mapped.stored.detach() if pristine is None else pristine
    value: Tensor = mapped.stored.detach()
    for weight_map in mapped.chain.active:
        if weight_map not in stay and not (leave == "unmasked" and weight_map.lane >= Lane.MASK):
            value = weight_map.bake(value) if leave == "baked" else weight_map(value)
    return value.detach()


def _detach_parts(module: nn.Module, leave: Leave, values: dict[int, Tensor], stay: Collection[Attachment]) -> None:
    """Take the parts off, and let them into the values of mapped tensors or into plain weights."""
    for _, layer, stack in list(part_stacks(module)):
        leaving = [part for part in stack if part not in stay]
        untouched = leave == "pristine" and stack.version == stack.count(layer)
        for name in dict.fromkeys([*stack.pristine, *stack.into(layer)]):
            stored: Any = layer._parameters[name]
            mapped = is_mapped(layer, name)
            value = values.get(id(stored)) if mapped else stored
            if untouched and not mapped:
                value = stack.pristine.get(name, stored)
            elif value is not None and not untouched:
                merging = [part for part in stack.merging if part not in stay]
                with gathered(*merging):
                    value = spread_as(stored, stack.merged(name, whole(value), merging))
            if id(stored) in values and value is not None:
                values[id(stored)] = value
            elif value is not None and value is not stored:
                stored.copy_(value)
        take_parts(layer, stack, leaving)


def check_stay(module: nn.Module, stay: Collection[Attachment]) -> None:
    """Refuse what would have to leave from outside of something that stays: the weight within could not take it in.

    Args:
        module: The module with everything on it.
        stay: Maps and parts that are to stay when the rest is taken off.

    Raises:
        MisconfigurationException: There is such a map or part.
    """
    for mapped in mapped_tensors(module):
        _check_order(mapped.name, mapped.maps, mapped.maps, stay)
    for path, layer, stack in part_stacks(module):
        merging = [part for part in stack if part.merges]
        _check_order(path, stack.parts, merging, stay)
        for name in stack.into(layer):
            chain = layer.weight_maps.get(name) if isinstance(layer, MappedLayer) else None
            maps: Sequence[WeightMap] = [] if chain is None else chain.maps
            entering = [part for part in merging if name in part.into]
            _check_order(f"{path}.{name}", [*maps, *entering], entering, stay)


def _check_order(name: str, entries: Sequence[Attachment], baked: Sequence[Attachment], stay: Collection[Attachment]) -> None:
    kept: Attachment | None = None
    for entry in entries:
        if entry in stay:
            kept = entry
        elif kept is not None and entry in baked:
            raise MisconfigurationException(
                f"{kept.owner} keeps {kept.kind!r} on {name}, and {entry.kind!r} of {entry.owner} stands outside of it, so the "
                f"stored weight cannot take it in when the run ends. Keep both ({entry.method or entry.owner}.stays = True), "
                f"bake the first one before (lightning_peft.bake(module)), or leave the layer out of one of them with "
                f"exclude=[{name.removesuffix('.weight').removesuffix('.bias')!r}]."
            )
