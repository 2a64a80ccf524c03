"""Weight maps: functions between the tensor an optimizer stores and the weight a layer uses.

Every reader of ``layer.weight`` sees the mapped weight, whatever code reads it (:mod:`lightning_peft.weights.mapped_layer`).
On one tensor they are applied in lane order: stored value, reparametrisation, low-rank delta, mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.compose.lanes import Lane
from lightning_peft.network.plain_tensors import plain_tensors as plain_tensors
from lightning_peft.weights.map_modules import MapModules
from lightning_peft.weights.mapped_layer import (
    MapChain,
    MappedLayer,
    chain_on,
    final_value,
    is_mapped,
)
from lightning_peft.weights.parts import check_masks, part_stacks, placed_parts
from lightning_peft.weights.shards import read_whole, spread_as, whole
from lightning_peft.weights.weight_map import WeightMap as WeightMap

MapT = TypeVar("MapT", bound=WeightMap)


@dataclass(slots=True)
class MappedTensor:
    """A tensor under weight maps: its plain qualified name, the layer that owns it, and the maps in order."""

    name: str
    layer: nn.Module
    attribute: str

    @property
    def chain(self) -> MapChain:
        """The maps with what it takes to undo them."""
        assert isinstance(self.layer, MappedLayer)
        return self.layer.weight_maps[self.attribute]

    @property
    def maps(self) -> list[WeightMap]:
        """The maps, innermost first."""
        return list(self.chain.maps)

    @property
    def stored(self) -> nn.Parameter:
        """The tensor that the optimizer updates."""
        return self.layer._parameters[self.attribute]  # type: ignore[return-value]

    @property
    def untouched(self) -> bool:
        """Whether the tensor was not changed since its maps came, so that the value it had before can come back."""
        return self.stored._version == self.chain.version

    def entering(self, weight_map: WeightMap) -> Tensor:
        """Return the value one of the maps is given by those below it, whole and without a graph."""
        value: Tensor = whole(self.stored.detach())
        with read_whole(*self.maps):
            for below in self.maps:
                if below is weight_map:
                    break
                if below.enabled:
                    value = below(value)
        return value.detach()

    @torch.no_grad()
    def leaving(self, weight_map: WeightMap) -> Tensor:
        """Return the value one of the maps gives to those above it, whole and without a graph."""
        with read_whole(weight_map):
            value: Tensor = weight_map(self.entering(weight_map))
        return value

    @torch.no_grad()
    def set_entering(self, weight_map: WeightMap, value: Tensor) -> None:
        """Store what one of the maps is given as this value, whole, by those below it."""
        below = self.maps[: self.maps.index(weight_map)]
        if below:
            with read_whole(*below):
                value = self.chain.enter(value, outermost=below[-1])
        self.stored.copy_(spread_as(self.stored, value))

    def unmasked(self) -> Tensor:
        """The value that enters the masks, without a graph."""
        value: Tensor = self.stored.detach()
        for weight_map in self.chain.active:
            if weight_map.lane < Lane.MASK:
                value = weight_map(value)
        return value.detach()

    def baked(self) -> Tensor:
        """The value this tensor has in an ordinary module."""
        return final_value(self.layer, self.attribute)


def mapped_tensors(module: nn.Module, *, every_name: bool = False) -> Iterator[MappedTensor]:
    """Yield every tensor of a module that carries weight maps, in module order.

    Args:
        module: The module.
        every_name: Yield what stands in several places of the module (one layer used twice) under each of its names, as a
            state dict does; by default it comes once, under the first.
    """
    # `named_modules` hands each module up through all levels, which is most of a walk that methods take in every step.
    seen: set[nn.Module] = set()
    left: list[tuple[str, nn.Module]] = [("", module)]
    while left:
        prefix, layer = left.pop()
        if not every_name:
            if layer in seen:
                continue
            seen.add(layer)
        if isinstance(layer, MappedLayer):
            for attribute in layer.weight_maps:
                yield MappedTensor(f"{prefix}{attribute}", layer, attribute)
        if layer._modules:
            left += [(f"{prefix}{name}.", child) for name, child in reversed(layer._modules.items()) if child is not None]


def maps_of(module: nn.Module, kind: type[MapT], owner: str) -> Iterator[tuple[MappedTensor, MapT]]:
    """Yield the mapped tensors that carry a map of some class from some method, each with that map, in module order."""
    for mapped in mapped_tensors(module):
        for entry in mapped.maps:
            if isinstance(entry, kind) and entry.owner == owner:
                yield mapped, entry


def parameters_with_maps(part: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a part of a module, then those that weight maps and layer parts in it hold for themselves.

    ``parameters()`` of the whole module yields both, that of a part its own alone.
    """
    yield from part.parameters()
    for mapped in mapped_tensors(part):
        for weight_map in mapped.maps:
            yield from weight_map.parameters()
    for placed in placed_parts(part):
        yield from placed.part.parameters()


def plain_values(module: nn.Module) -> dict[str, Tensor]:
    """The same names, with the value that enters the masks: what an ordinary module would hold, still dense."""
    values = {name: tensor.detach() for name, tensor in plain_tensors(module).items()}
    return values | {mapped.name: mapped.unmasked() for mapped in mapped_tensors(module, every_name=True)}


@torch.no_grad()
def set_plain_values(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values that :func:`plain_values` would then return; maps keep their own parameters.

    Raises:
        MisconfigurationException: A map below the masks cannot be inverted.
    """
    tensors = plain_tensors(module)
    mapped = {entry.name: entry for entry in mapped_tensors(module, every_name=True)}
    for name, value in values.items():
        if name in mapped:
            _check_invertible(mapped[name])
            with read_whole(*mapped[name].maps):
                value = mapped[name].chain.enter(value)
        tensors[name].copy_(spread_as(tensors[name], value))


def _check_invertible(mapped: MappedTensor, inside: Lane = Lane.MASK) -> None:
    for weight_map in mapped.chain.active:
        if weight_map.lane < Lane.MASK and weight_map.lane <= inside and not hasattr(weight_map, "right_inverse"):
            raise MisconfigurationException(
                f"{mapped.name} is under the weight map {weight_map.kind!r} of {weight_map.owner}, which cannot be inverted, "
                "so its value cannot be set. Leave the layer out of that method with exclude=."
            )


def split_name(name: str) -> tuple[str, str]:
    """Split ``"model.fc.weight"`` into ``("model.fc", "weight")``."""
    path, _, attribute = name.rpartition(".")
    return path, attribute


def plain_name(key: str) -> str:
    """Return the name a state-dict key has without weight maps.

    Example:
        >>> plain_name("model.fc.parametrizations.weight.original"), plain_name("model.fc.bias")
        ('model.fc.weight', 'model.fc.bias')
    """
    return re.sub(r"(^|\.)parametrizations\.([^.]+)\.original$", r"\1\2", key)


def attached_map(module: nn.Module, name: str, like: WeightMap) -> WeightMap | None:
    """Return the map of the same method and kind that the tensor called ``name`` carries already, if it does."""
    path, attribute = split_name(name)
    layer = module.get_submodule(path)
    maps = layer.weight_maps[attribute].maps if isinstance(layer, MappedLayer) and attribute in layer.weight_maps else []
    return next((entry for entry in maps if (entry.owner, entry.key) == (like.owner, like.key)), None)


def attach_map(module: nn.Module, name: str, weight_map: WeightMap) -> MappedTensor:
    """Put a map on the tensor called ``name``, outside the maps of its lane and of those below.

    The ``nn.Parameter`` object stays the same, so optimizers remain valid. A map with a ``right_inverse`` leaves what the layer
    computes as it is, whatever invertible maps are below it: the stored value changes in place.

    Args:
        module: Module in which ``name`` is looked up.
        name: Plain qualified name of a parameter, for instance ``"model.fc1.weight"``.
        weight_map: The map.

    Returns:
        A handle on the mapped tensor.

    Raises:
        MisconfigurationException: The tensor is parametrized by somebody else, or the map would keep its value but stands on
            one that cannot be inverted.
    """
    path, attribute = split_name(name)
    layer = module.get_submodule(path)
    stored = _mappable(layer, path, attribute)
    mapped = MappedTensor(name, layer, attribute)
    if weight_map.lane >= Lane.MASK and isinstance(layer, MappedLayer) and attribute == "weight":
        for part in layer.part_stack or ():
            check_masks(path, part, weight_map)
    if weight_map.lane == Lane.REPARAM and not stored.requires_grad:
        weight_map.requires_grad_(False)  # the other view of a frozen tensor is frozen; deltas and masks train beside one
    keeps = hasattr(weight_map, "right_inverse")
    if keeps and is_mapped(layer, attribute):
        _check_invertible(mapped, weight_map.lane)
    chain = chain_on(layer, attribute)
    untouched = not chain.maps or mapped.untouched
    with torch.no_grad():
        chain.maps.insert(sum(entry.lane <= weight_map.lane for entry in chain.maps), weight_map)
        if keeps:
            value = mapped.entering(weight_map)
            if untouched and chain.pristine is None:
                chain.pristine = stored.detach().clone()
            stored.copy_(chain.enter(value, outermost=weight_map))
    if untouched:
        chain.version = stored._version
    MapModules.show(module)
    return mapped


def _mappable(layer: nn.Module, path: str, attribute: str) -> nn.Parameter:
    """Return a layer's own parameter, or refuse when it is none or somebody else computes it."""
    if parametrize.is_parametrized(layer, attribute):
        others = ", ".join(type(entry).__name__ for entry in layer.parametrizations[attribute])  # type: ignore[index]
        raise MisconfigurationException(
            f"{path}.{attribute} is already parametrized by {others}, which would be lost when the result is baked. Remove it "
            f"with torch.nn.utils.parametrize.remove_parametrizations first, or pass exclude=[{path!r}]."
        )
    if any(type(hook).__name__ in {"WeightNorm", "SpectralNorm"} for hook in layer._forward_pre_hooks.values()):
        raise MisconfigurationException(
            f"{path} uses the old torch.nn.utils.weight_norm or spectral_norm, which rewrites its weight in a hook. Use "
            f"torch.nn.utils.parametrizations and exclude the layer, or pass exclude=[{path!r}]."
        )
    stored = layer._parameters.get(attribute)
    if stored is None:
        getattr(layer, attribute)
        raise MisconfigurationException(
            f"{path}.{attribute} is not a parameter of {type(layer).__name__}; maps need a trainable tensor."
        )
    return stored


def forget_pristine(module: nn.Module) -> None:
    """Free the copies that :func:`detach_maps` would need to undo an attachment; training has made them useless."""
    for mapped in mapped_tensors(module):
        mapped.chain.pristine = None
    for _, _, stack in part_stacks(module):
        stack.pristine = {}
