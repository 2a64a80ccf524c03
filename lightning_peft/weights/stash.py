"""The stash: stored values of mapped tensors, kept beside a module whose maps were taken off after a fit.

A fit ends with an ordinary module. The values the optimizer trained are not in it any more (a masked weight is zero there), so
they wait here for the next ``fit``, ``test`` or ``save_checkpoint`` of the same process, which then continue exactly.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.weights.maps import mapped_tensors, split_name


@dataclass(slots=True)
class StashedTensor:
    """Stored value and map states of one tensor, and how to see that the module still holds what was left in it."""

    value: Tensor
    records: list[dict[str, Any]]
    states: list[dict[str, Tensor]]
    identity: tuple[int, int] = (0, 0)


_STASHES: weakref.WeakKeyDictionary[nn.Module, dict[str, StashedTensor]] = weakref.WeakKeyDictionary()


def fill(module: nn.Module) -> None:
    """Remember the stored values of a module; call before its maps are taken off."""
    stash: dict[str, StashedTensor] = {}
    places: dict[int, StashedTensor] = {}  # a layer that stands in several places is kept once
    for mapped in mapped_tensors(module, every_name=True):
        if id(mapped.chain) not in places:
            places[id(mapped.chain)] = StashedTensor(
                mapped.stored.detach().clone(),
                [weight_map.record() for weight_map in mapped.maps],
                [{k: v.detach().clone() for k, v in weight_map.state_dict().items()} for weight_map in mapped.maps],
            )
        stash[mapped.name] = places[id(mapped.chain)]
    if stash:
        _STASHES[module] = stash
    else:
        _STASHES.pop(module, None)


def seal(module: nn.Module) -> None:
    """Note what the plain module looks like; call after its maps were taken off."""
    for name, stashed in _STASHES.get(module, {}).items():
        stashed.identity = _identity(module, name)


def peek(module: nn.Module) -> dict[str, StashedTensor]:
    """Return the stash of a plain module, or nothing when any of its tensors changed since :func:`seal`."""
    stash = _STASHES.get(module, {})
    try:
        unchanged = all(_identity(module, name) == stashed.identity for name, stashed in stash.items())
    except AttributeError:
        unchanged = False
    return stash if unchanged else {}


@torch.no_grad()
def restore(module: nn.Module, stash: dict[str, StashedTensor]) -> None:
    """Write a stash into a module whose maps are attached again; tensors whose maps differ now are left alone."""
    for mapped in mapped_tensors(module):
        stashed = stash.get(mapped.name)
        if stashed is None or [item["map"] for item in stashed.records] != [weight_map.kind for weight_map in mapped.maps]:
            continue
        if mapped.chain.pristine is None:
            mapped.chain.pristine = mapped.stored.detach().clone()
        mapped.stored.copy_(stashed.value)
        for weight_map, state in zip(mapped.maps, stashed.states, strict=True):
            weight_map.load_state_dict(state)
        # An evaluation that starts here must end with the module it was given.
        mapped.chain.version = mapped.stored._version


def _identity(module: nn.Module, name: str) -> tuple[int, int]:
    path, attribute = split_name(name)
    tensor = getattr(module.get_submodule(path), attribute)
    return id(tensor), tensor._version
