"""The stash: stored values of mapped tensors and parts, kept beside a module they were taken off after a fit.

A fit ends with an ordinary module. The values the optimizer trained are not in it any more (a masked weight is zero there), so
they wait here for the next ``fit``, ``test`` or ``save_checkpoint`` of the same process, which then continue exactly.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network.tensor_bytes import checksum
from lightning_peft.weights.attachment import Attachment
from lightning_peft.weights.maps import mapped_tensors, split_name
from lightning_peft.weights.parts import part_stacks


@dataclass(slots=True)
class StashedTensor:
    """Stored value and map states of one tensor, and how to see that the module still holds what was left in it."""

    value: Tensor
    records: list[dict[str, Any]]
    states: list[dict[str, Tensor]]
    content: int = 0


@dataclass(slots=True)
class StashedParts:
    """The parts of one layer, its own tensors that they went into, and how to see that the layer is what was left.

    Attributes:
        values: Tensors without them, by name; those under weight maps are stashed with these.
        records: What :meth:`LayerPart.record` gave, innermost first.
        states: Their tensors.
        into: Names of the tensors that they went into.
        contents: Digest of every tensor that the layer holds, by name.
    """

    values: dict[str, Tensor]
    records: list[dict[str, Any]]
    states: list[dict[str, Any]]
    into: list[str]
    contents: dict[str, int]


_PARTS: weakref.WeakKeyDictionary[nn.Module, dict[str, StashedParts]] = weakref.WeakKeyDictionary()
_STASHES: weakref.WeakKeyDictionary[nn.Module, dict[str, StashedTensor]] = weakref.WeakKeyDictionary()


def fill(module: nn.Module, stay: Collection[Attachment] = frozenset()) -> None:
    """Remember the stored values of a module; call before its maps are taken off.

    Args:
        module: The module.
        stay: Maps and parts that stay on it. What they stand on is at hand with them, and nothing of it is remembered.
    """
    stash: dict[str, StashedTensor] = {}
    places: dict[int, StashedTensor] = {}  # a layer that stands in several places is kept once
    for mapped in mapped_tensors(module, every_name=True):
        if any(weight_map in stay for weight_map in mapped.maps):
            continue
        if id(mapped.chain) not in places:
            places[id(mapped.chain)] = StashedTensor(
                mapped.stored.detach().clone(),
                [weight_map.record() for weight_map in mapped.maps],
                [{k: v.detach().clone() for k, v in weight_map.state_dict().items()} for weight_map in mapped.maps],
            )
        stash[mapped.name] = places[id(mapped.chain)]
    parts: dict[str, StashedParts] = {}
    for path, layer, stack in part_stacks(module, every_name=True):
        if not stack.recorded or any(part in stay for part in stack):
            continue
        into = stack.into(layer)
        own: Any = {name: layer._parameters[name] for name in into if f"{path}.{name}".lstrip(".") not in stash}
        parts[path] = StashedParts(
            {name: tensor.detach().clone() for name, tensor in own.items()},
            [part.record() for part in stack.recorded],
            [_copied(part.state_dict()) for part in stack.recorded],
            into,
            {},
        )
    _STASHES[module] = stash
    _PARTS[module] = parts


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def seal(module: nn.Module) -> None:
    """Note what the plain module looks like; call after its maps were taken off.

    Nothing is kept for a module that has lost some of its layers since :func:`fill`: a fit that failed before its first step
    gives back the structure it found.
    """
    try:
        for name, stashed in _STASHES.get(module, {}).items():
            stashed.content = _content(module, name)
        for path, held in _PARTS.get(module, {}).items():
            held.contents = _contents(module, path)
    except AttributeError:
        _STASHES.pop(module, None)
        _PARTS.pop(module, None)


def peek(module: nn.Module) -> dict[str, StashedTensor]:
    """Return the stash of a plain module, or nothing when any of its tensors changed since :func:`seal`."""
    stash = _STASHES.get(module, {})
    try:
        unchanged = all(_content(module, name) == stashed.content for name, stashed in stash.items())
    except AttributeError:
        unchanged = False
    return stash if unchanged else {}


def peek_parts(module: nn.Module) -> dict[str, StashedParts]:
    """Return the stashed parts of a plain module by layer, or nothing when a tensor beside them changed since :func:`seal`."""
    held = _PARTS.get(module, {})
    try:
        unchanged = all(_contents(module, path) == parts.contents for path, parts in held.items())
    except AttributeError:
        unchanged = False
    return held if unchanged and (peek(module) or not _STASHES.get(module)) else {}


@torch.no_grad()
def restore(module: nn.Module, stash: dict[str, StashedTensor]) -> None:
    """Write a stash into a module whose maps are attached again; tensors whose maps differ now are left alone."""
    for mapped in mapped_tensors(module):
        stashed = stash.get(mapped.name)
        if stashed is None or [item["map"] for item in stashed.records] != [weight_map.kind for weight_map in mapped.maps]:
            continue
        if not all(_holds(weight_map, state) for weight_map, state in zip(mapped.maps, stashed.states, strict=True)):
            continue
        if mapped.chain.pristine is None:
            mapped.chain.pristine = mapped.stored.detach().clone()
        mapped.stored.copy_(stashed.value)
        for weight_map, state in zip(mapped.maps, stashed.states, strict=True):
            weight_map.load_state_dict(state)
        # An evaluation that starts here must end with the module it was given.
        mapped.chain.version = mapped.stored._version


@torch.no_grad()
def restore_parts(module: nn.Module, held: dict[str, StashedParts]) -> None:
    """Write stashed parts into a module that has them again; layers whose parts differ now are left alone."""
    for path, layer, stack in part_stacks(module):
        stashed = held.get(path)
        if stashed is None or [(record["name"], record["part"]) for record in stashed.records] != stack.names:
            continue
        if [record["config"] for record in stashed.records] != [part.config() for part in stack.recorded]:
            continue
        for name, value in stashed.values.items():
            own: Any = layer._parameters[name]
            stack.pristine[name] = own.detach().clone()
            own.copy_(value)
        for part, record, state in zip(stack.recorded, stashed.records, stashed.states, strict=True):
            part.load_state_dict(state)
            part.enabled = record["enabled"]
        stack.version = stack.count(layer)


def _holds(attachment: Attachment, state: dict[str, Tensor]) -> bool:
    """Whether a state has the shapes of an attachment's tensors: not after a fit with another rank."""
    own = attachment.state_dict()
    return own.keys() == state.keys() and all(own[key].shape == value.shape for key, value in state.items())


# Neither the identity of a tensor nor its count of changes says whether its values are the same: assignments to ``.data`` leave
# both as they are.
def _contents(module: nn.Module, path: str) -> dict[str, int]:
    layer = module.get_submodule(path)
    return {name: checksum(p) for name, p in layer._parameters.items() if p is not None}


def _content(module: nn.Module, name: str) -> int:
    path, attribute = split_name(name)
    return checksum(getattr(module.get_submodule(path), attribute))
