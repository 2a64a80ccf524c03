"""Weight maps: functions between the tensor an optimizer stores and the weight a layer uses.

Maps sit on ``torch.nn.utils.parametrize``, so every reader of ``layer.weight`` sees the mapped weight, whatever code reads it.
On one tensor they are applied in lane order: stored value, reparametrisation, low-rank delta, mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.compose.lanes import Lane


class WeightMap(nn.Module):
    """One function on one stored tensor; subclasses define :meth:`forward` and, when they need one, ``right_inverse``.

    Learnable parameters are ordinary ``nn.Parameter`` attributes. Tensors that must not be averaged by EMA or saved (masks)
    are plain attributes: they follow the module across devices but are no buffers, because averaging buffers turns a mask
    into fractions.

    Attributes:
        kind: Name under which a checkpoint records the map.
        lane: Where the map stands on its tensor.
        optimizer_overrides: Hyperparameters of the parameter group its own parameters train in, for instance
            ``{"weight_decay": 0.0}``.
        lr_scale: Factor on the learning rate of that group.
    """

    kind: ClassVar[str]
    lane: ClassVar[Lane]
    owner: str = ""  # name of the method that attached the map; set by Method.map_weight
    optimizer_overrides: ClassVar[dict[str, float]] = {}
    lr_scale: float = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        """Map the value coming from the lane below to the value for the lane above; same shape and dtype."""
        raise NotImplementedError

    def bake(self, weight: Tensor) -> Tensor:
        """Map a value for good; differs from :meth:`forward` only where training sees something softer."""
        return self.forward(weight)

    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain data, so that a file can be baked without the model's class."""
        return {}

    def detached(self) -> None:
        """Let go of whatever else than its tensor the map holds on to; called when it is taken off."""

    def record(self) -> dict[str, Any]:
        """Describe the map for a checkpoint, as plain data."""
        return {"map": self.kind, "method": self.owner, "config": self.config()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightMap:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, fn(value))
        return self


MapT = TypeVar("MapT", bound=WeightMap)


@dataclass(slots=True)
class MappedTensor:
    """A tensor under weight maps: its plain qualified name, the layer that owns it, and the maps in order."""

    name: str
    layer: nn.Module
    attribute: str

    @property
    def chain(self) -> parametrize.ParametrizationList:
        """The parametrizations on the tensor."""
        return self.layer.parametrizations[self.attribute]  # type: ignore[index,return-value]

    @property
    def maps(self) -> list[WeightMap]:
        """The maps, innermost first."""
        return list(self.chain)  # type: ignore[arg-type]

    @property
    def stored(self) -> nn.Parameter:
        """What the optimizer updates."""
        return self.chain.original  # type: ignore[return-value]

    def entering(self, weight_map: WeightMap) -> Tensor:
        """Return the value one of the maps is given by those below it, without a graph."""
        value: Tensor = self.stored.detach()
        for below in self.maps:
            if below is weight_map:
                break
            value = below(value)
        return value.detach()

    def unmasked(self) -> Tensor:
        """The value that enters the masks, without a graph."""
        value: Tensor = self.stored.detach()
        for weight_map in self.maps:
            if weight_map.lane < Lane.MASK:
                value = weight_map(value)
        return value.detach()

    def baked(self) -> Tensor:
        """The value this tensor has in an ordinary module."""
        value: Tensor = self.stored.detach()
        for weight_map in self.maps:
            value = weight_map.bake(value)
        return value.detach()


def mapped_tensors(module: nn.Module, *, every_name: bool = False) -> Iterator[MappedTensor]:
    """Yield every tensor of a module that carries weight maps, in module order.

    Args:
        module: The module.
        every_name: Yield what stands in several places of the module (one layer used twice) under each of its names, as a
            state dict does; by default it comes once, under the first.
    """
    for prefix, layer in module.named_modules(remove_duplicate=not every_name):
        if not parametrize.is_parametrized(layer):
            continue
        for attribute, chain in layer.parametrizations.items():
            if all(isinstance(entry, WeightMap) for entry in chain):
                yield MappedTensor(f"{prefix}.{attribute}" if prefix else attribute, layer, attribute)


def maps_of(module: nn.Module, kind: type[MapT], owner: str) -> Iterator[tuple[MappedTensor, MapT]]:
    """Yield the mapped tensors that carry a map of some class from some method, each with that map, in module order."""
    for mapped in mapped_tensors(module):
        for entry in mapped.maps:
            if isinstance(entry, kind) and entry.owner == owner:
                yield mapped, entry


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the name they have without weight maps: what is stored, maps' own tensors left out.

    A tied tensor appears under each of its names.

    Example:
        >>> list(plain_tensors(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for mapped in mapped_tensors(module, every_name=True):
        path, attribute = split_name(mapped.name)
        prefix = f"{path}.parametrizations.{attribute}." if path else f"parametrizations.{attribute}."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        tensors[mapped.name] = mapped.stored
    return tensors


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
        for weight_map in reversed(mapped[name].maps if name in mapped else []):
            if weight_map.lane >= Lane.MASK:
                continue
            inverse = getattr(weight_map, "right_inverse", None)
            if inverse is None:
                raise MisconfigurationException(
                    f"{name} is under the weight map {weight_map.kind!r} of {weight_map.owner}, which cannot be inverted, so "
                    "its value cannot be set. Leave the layer out of that method with exclude=."
                )
            value = inverse(value)
        tensors[name].copy_(value)


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
    """Return the map of the same owner and kind that the tensor called ``name`` carries already, if it does."""
    path, attribute = split_name(name)
    layer = module.get_submodule(path)
    if not parametrize.is_parametrized(layer, attribute):
        return None
    maps = (entry for entry in MappedTensor(name, layer, attribute).chain if isinstance(entry, WeightMap))
    return next((entry for entry in maps if (entry.owner, entry.kind) == (like.owner, like.kind)), None)


def attach_map(module: nn.Module, name: str, weight_map: WeightMap) -> MappedTensor:
    """Put a map on the tensor called ``name``, outside the maps already there.

    The ``nn.Parameter`` object stays the same, so optimizers remain valid; a ``right_inverse`` changes its value in place.

    Args:
        module: Module in which ``name`` is looked up.
        name: Plain qualified name of a parameter, for instance ``"model.fc1.weight"``.
        weight_map: The map.

    Returns:
        A handle on the mapped tensor.

    Raises:
        MisconfigurationException: The tensor is parametrized by somebody else.
    """
    path, attribute = split_name(name)
    layer = module.get_submodule(path)
    mapped = MappedTensor(name, layer, attribute)
    if parametrize.is_parametrized(layer, attribute):
        if not all(isinstance(entry, WeightMap) for entry in mapped.chain):
            others = ", ".join(type(entry).__name__ for entry in mapped.chain)
            raise MisconfigurationException(
                f"{name} is already parametrized by {others}, which would be lost when the result is baked. Remove it with "
                f"torch.nn.utils.parametrize.remove_parametrizations first, or pass exclude=[{path!r}]."
            )
        parametrize.register_parametrization(layer, attribute, weight_map, unsafe=True)
        return mapped
    if any(type(hook).__name__ in {"WeightNorm", "SpectralNorm"} for hook in layer._forward_pre_hooks.values()):
        raise MisconfigurationException(
            f"{path} uses the old torch.nn.utils.weight_norm or spectral_norm, which rewrites its weight in a hook. Use "
            f"torch.nn.utils.parametrizations and exclude the layer, or pass exclude=[{path!r}]."
        )
    order = list(layer._parameters)
    before = getattr(layer, attribute)
    if not isinstance(before, nn.Parameter):
        raise MisconfigurationException(f"{name} is not a parameter of {type(layer).__name__}; maps need a trainable tensor.")
    if weight_map.lane == Lane.REPARAM and not before.requires_grad:
        weight_map.requires_grad_(False)  # the other view of a frozen tensor is frozen; deltas and masks train beside one
    pristine = before.detach().clone() if hasattr(weight_map, "right_inverse") else None
    parametrize.register_parametrization(layer, attribute, weight_map, unsafe=True)
    mapped.chain.__dict__["peft_order"] = order
    mapped.chain.__dict__["peft_pristine"] = pristine
    mapped.chain.__dict__["peft_version"] = mapped.stored._version
    return mapped


def forget_pristine(module: nn.Module) -> None:
    """Free the copies that :func:`detach_maps` would need to undo an attachment; training has made them useless."""
    for mapped in mapped_tensors(module):
        mapped.chain.__dict__["peft_pristine"] = None


Leave = Literal["baked", "live", "pristine", "unmasked"]


@torch.no_grad()
def detach_maps(module: nn.Module, leave: Leave = "baked") -> None:
    """Take all weight maps off a module; names, classes, parameter objects and their order are as before.

    Args:
        module: The module.
        leave: Value the tensors keep: ``"baked"``, what the layers saw last (``"live"``), the same without masks
            (``"unmasked"``), or the value they had before the maps came (``"pristine"``; tensors loaded or trained since then
            keep their live value).
    """
    tensors = list(mapped_tensors(module))
    values: dict[int, Tensor] = {}
    for mapped in tensors:
        stored = mapped.stored
        if id(stored) not in values:  # a tied tensor is mapped once
            values[id(stored)] = _final_value(mapped, leave)
    for mapped in tensors:
        order: list[str] = mapped.chain.__dict__["peft_order"]
        stored = mapped.stored
        for weight_map in mapped.maps:
            weight_map.detached()
        _strip(mapped.layer, mapped.attribute)
        if id(stored) in values:
            stored.copy_(values.pop(id(stored)))
        parameters = mapped.layer._parameters
        for key in [key for key in order if key in parameters]:
            parameters[key] = parameters.pop(key)


def _strip(layer: nn.Module, attribute: str) -> None:
    """Undo one registration; ``torch`` edits the generated class for that, which a deep copy shares with its original."""
    parametrized = type(layer)
    chains = layer.parametrizations
    stored = chains[attribute].original  # type: ignore[index,union-attr]
    del chains[attribute]  # type: ignore[operator,union-attr]
    if len(chains) == 0:  # type: ignore[arg-type]
        del layer.parametrizations
        layer.__class__ = parametrized.__bases__[0]
    else:
        namespace = {
            key: value for key, value in vars(parametrized).items() if key not in (attribute, "__dict__", "__weakref__")
        }
        layer.__class__ = type(parametrized.__name__, parametrized.__bases__, namespace)
    layer.register_parameter(attribute, stored)


def _final_value(mapped: MappedTensor, leave: Leave) -> Tensor:
    if leave == "baked":
        return mapped.baked()
    if leave == "unmasked":
        return mapped.unmasked()
    if leave == "pristine" and mapped.stored._version == mapped.chain.__dict__["peft_version"]:
        pristine: Tensor | None = mapped.chain.__dict__["peft_pristine"]
        return mapped.stored.detach() if pristine is None else pristine
    live: Tensor = getattr(mapped.layer, mapped.attribute)
    return live.detach()
