"""Checkpoints of a module under weight maps as ordinary ones: plain names and the weights that layers saw.

What training needs beside those weights stands in the library's section, under the names of training time: stored values where
they are not the weight itself, and whatever maps hold. A fingerprint of each weight tells whether it is still the one that
the stored value belongs to, for anybody may edit the tensors of an ordinary checkpoint.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network.tensor_bytes import checksum, tensor_bytes
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.weights.mapped_layer import map_prefix, maps_prefix, stored_key
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.shards import spread_as, whole

PLAIN = 3
"""The first format of the section whose checkpoints hold plain names."""


@torch.no_grad()
def seen_values(
    module: nn.Module, state: Mapping[str, Any], context: contextlib.AbstractContextManager[Any] | None = None
) -> dict[str, Tensor]:
    """Return the weights that layers would see with the tensors of a state, by plain name.

    Args:
        module: The module, its weight maps as they act now.
        state: Its own tensors, or an average of them, by training-time name.
        context: The precision that the module is run in; what maps compute may depend on it.
    """
    seen: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}  # a layer that stands in several places is computed once, and saved once
    with context or contextlib.nullcontext():
        for mapped in mapped_tensors(module, every_name=True):
            stored = state[stored_key(mapped.name)]
            if id(mapped.chain) not in known:
                states = [below(state, map_prefix(mapped.name, place)) for place in range(len(mapped.maps))]
                there = mapped.stored.device
                value = mapped.chain.value_of(whole(stored).to(there), [_moved(each, there) for each in states])
                known[id(mapped.chain)] = spread_as(stored, value.to(stored.device, stored.dtype))
            seen[mapped.name] = known[id(mapped.chain)]
    return seen


def below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return what stands below a prefix in a state, by the rest of its names."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _moved(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: whole(value).to(device) if isinstance(value, Tensor) else value for key, value in state.items()}


def split(state: Mapping[str, Any], seen: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the tensors of a module under weight maps into those of an ordinary one, and what training needs beside them.

    Args:
        state: Tensors by training-time name.
        seen: The weights under maps by plain name.

    Returns:
        Tensors by plain name, in the order of an ordinary module; and the rest, by training-time name. A stored value that is
        the weight itself, bit for bit, is not in the rest.
    """
    plain: OrderedDict[str, Any] = OrderedDict()
    beside: dict[str, Any] = {}
    stored = {stored_key(name): name for name in seen}
    prefixes = tuple(map(maps_prefix, seen))
    for key, value in state.items():
        if key in stored:
            name = stored[key]
            same = _same_bits(value, seen[name])
            plain[name] = value if same else seen[name]
            if not same:
                beside[key] = value
        elif prefixes and key.startswith(prefixes):
            beside[key] = value
        else:
            plain[key] = value
    return with_versions(plain, state, prefixes), beside


def stored_beside(plain: Mapping[str, Any], trained: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what training needs beside the tensors of a plain module, as :func:`split` does for one under maps.

    Args:
        plain: The module's tensors.
        trained: Tensors by training-time name, for each weight that was under maps.
    """
    beside: dict[str, Any] = {}
    for name, tensors in trained.items():
        same = _same_bits(tensors[stored_key(name)], plain[name])
        beside |= {key: value for key, value in tensors.items() if not (same and key == stored_key(name))}
    return beside


def with_versions(made: Mapping[str, Any], state: Mapping[str, Any], prefixes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Hand on the versions of modules that a state dict carries and some classes ask for (``_metadata``).

    Args:
        made: Tensors by name.
        state: The state dict that they come from.
        prefixes: Beginnings of the names of modules that are none of an ordinary module, those of weight maps.
    """
    made = OrderedDict(made)
    if (versions := getattr(state, "_metadata", None)) is not None:
        kept = ((key, value) for key, value in versions.items() if not (prefixes and f"{key}.".startswith(prefixes)))
        made._metadata = OrderedDict(kept)  # type: ignore[attr-defined]
    return made


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN and the sign of zero included."""
    if a is b:
        return True
    a, b = whole(a), whole(b)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(tensor_bytes(a), tensor_bytes(b))


def masks_of(state: object, names: Collection[str]) -> dict[str, Any]:
    """Return what maps hold that is no parameter and no buffer: what averages of a module do not follow.

    Args:
        state: The module's tensors by training-time name.
        names: Names of the weights under maps.
    """
    prefixes = tuple(map(maps_prefix, names))
    if not isinstance(state, Mapping):
        return {}
    return {key: value for key, value in state.items() if key.endswith("_extra_state") and key.startswith(prefixes)}


def section_tensors(
    state: Mapping[str, Any], beside: Mapping[str, Any], names: Collection[str], base: Collection[str] = ()
) -> dict[str, Any]:
    """Return what the library's section holds beside an ordinary state dict.

    Args:
        state: Tensors by plain name, as they go into the file; what its owner took out of it is left out here too.
        beside: What :func:`split` gave beside them.
        names: Names of the weights under maps.
        base: Names of tensors that are not in the file because they are its base's.
    """
    there = [name for name in names if name in state]
    prefixes = tuple(maps_prefix(name) for name in names if name in state or name in base)
    tensors = {key: value for key, value in beside.items() if prefixes and key.startswith(prefixes)}
    return {"tensors": tensors, "seen": {name: fingerprint(state[name]) for name in there}}


def fingerprint(tensor: Tensor) -> int:
    """Return a checksum of what a tensor holds, the same on every device.

    Example:
        >>> ones = torch.ones(2)
        >>> fingerprint(ones) == fingerprint(ones.view(1, 2)), fingerprint(ones) == fingerprint(-ones)
        (True, False)
    """
    return checksum(whole(tensor))


def edited(state: Mapping[str, Any], section: Mapping[str, Any] | None) -> list[str]:
    """Name the weights under maps that are not what they were when the checkpoint was saved."""
    if section is None or section["version"] < PLAIN:
        return []
    seen, base = section.get("seen", {}), section.get("base") or {}
    there = [name for name in section["weights"] if name not in base and isinstance(state.get(name), Tensor)]
    return [name for name in there if seen.get(name) != fingerprint(state[name])]


def refuse_edited(names: Sequence[str]) -> None:
    """Refuse stored values whose weights were edited in the file.

    Raises:
        CheckpointError: There are such weights.
    """
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(
            f"{names[0]}{more} was changed in the file after it was saved, and the stored values that its weight maps trained "
            "belong to the old one. To use the file as it is now, load it as an ordinary one, "
            "ModelClass.load_from_checkpoint(path), and train on from there without ckpt_path."
        )


def joined(state: Mapping[str, Any], section: Mapping[str, Any] | None, leave: Collection[str] = ()) -> dict[str, Any]:
    """Undo :func:`split`: return the tensors of a checkpoint by training-time name.

    Args:
        state: The checkpoint's tensors. Formats before :data:`PLAIN` hold training-time names already.
        section: The library's part of the same checkpoint.
        leave: Names of weights that stay as they are.

    Raises:
        CheckpointError: The section holds something that does not fit the tensors.
    """
    if section is None or section["version"] < PLAIN or not section["weights"]:
        return dict(state)
    beside: MutableMapping[str, Any] = dict(section["tensors"])
    made: OrderedDict[str, Any] = OrderedDict()
    known = tuple(map(maps_prefix, section["weights"]))
    for name, value in state.items():
        if name.startswith(known):
            raise CheckpointError(f"The checkpoint holds {name} among the tensors of an ordinary module: it was edited.")
        if name not in section["weights"] or name in leave:
            made[name] = value
            continue
        stored = beside.pop(stored_key(name), value)
        if not isinstance(stored, Tensor) or not isinstance(value, Tensor) or stored.shape != value.shape:
            raise CheckpointError(f"The stored value of {name} in the checkpoint does not fit: it is damaged or was edited.")
        made[stored_key(name)] = stored
    left = tuple(maps_prefix(name) for name in section["weights"] if name in leave or name not in state)
    for key, value in beside.items():
        if not key.startswith(known):
            raise CheckpointError(f"The checkpoint holds {key}, but lists no weight map that it belongs to.")
        if not (left and key.startswith(left)):
            made[key] = value
    return with_versions(made, state)


def check_map_states(state: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse a state that lacks something the weight maps on a module hold, or has it as another type.

    Args:
        state: Tensors by training-time name, saved under the same maps.
        module: The module, its maps attached.

    Raises:
        CheckpointError: See above.
    """
    for mapped in mapped_tensors(module, every_name=True):
        if stored_key(mapped.name) not in state:
            continue
        for place, weight_map in enumerate(mapped.maps):
            prefix = map_prefix(mapped.name, place)
            found = below(state, prefix)
            own = weight_map.state_dict()
            wrong = sorted(found.keys() ^ own.keys()) or [key for key in own if not _alike(found[key], own[key])]
            if wrong:
                raise CheckpointError(
                    f"The state of the weight map {weight_map.kind!r} on {mapped.name} does not fit: {wrong[0]} is missing, "
                    "unknown or of another type. The file is damaged or was edited; use another checkpoint."
                )


def _alike(found: Any, own: Any) -> bool:
    if not isinstance(own, Tensor):
        return isinstance(found, type(own))
    kinds = (own.dtype.is_floating_point, own.dtype is torch.bool)
    return isinstance(found, Tensor) and (found.dtype.is_floating_point, found.dtype is torch.bool) == kinds
