"""Checkpoints that hold only what training changed, and a digest of every tensor of the base that they leave out.

What is left out is decided by content: a tensor that still is what it was when the training began. Frozen weights are, whoever
froze them; the stored values under a low-rank delta, be it a map or a layer part, are too, so neither they nor the weights they
make are in the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from lightning_peft.network.tensor_bytes import tensor_bytes
from lightning_peft.structure import base_shards
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.weights.mapped_layer import stored_key
from lightning_peft.weights.shards import is_shard, whole

Digests = dict[str, str]


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of what a tensor holds, its type and its shape, the same on every device."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(tensor_bytes(whole(tensor)).cpu().numpy().data)
    return found.hexdigest()


def digests(tensors: Mapping[str, Any]) -> Digests:
    """Return the digest of each tensor by name."""
    return {name: digest(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def is_still(tensor: Tensor, wanted: str) -> bool:
    """Whether a tensor has a digest."""
    return base_shards.is_still(tensor, wanted, digest) if is_shard(tensor) else digest(tensor) == wanted


def leave_out(
    plain: MutableMapping[str, Any],
    beside: MutableMapping[str, Any],
    weights: Mapping[str, Any],
    base: Digests,
    under_parts: MutableMapping[str, Any],
) -> Digests:
    """Take what is still the base out of a checkpoint's tensors, in place.

    Args:
        plain: Tensors by plain name.
        beside: What training needs beside them, by training-time name.
        weights: Names of the weights under maps.
        base: Digest of the stored value of each tensor when the training began, by plain name.
        under_parts: Weights without the layer parts that went into them in ``plain``, by plain name.

    Returns:
        Digests of what was taken out.
    """
    left = {}
    for name in [name for name in plain if name in base]:
        key = stored_key(name) if name in weights else name
        stored = under_parts.get(name, beside.get(key, plain[name]))
        if isinstance(stored, Tensor) and is_still(stored, base[name]):
            left[name] = base[name]
            beside.pop(key, None)
            under_parts.pop(name, None)
            del plain[name]
    return left


def leaves_out(section: Mapping[str, Any] | None) -> bool:
    """Say whether a checkpoint needs its base to be complete.

    Args:
        section: The library's part of it.
    """
    return bool(section and section.get("base"))


def filled(
    state: Mapping[str, Any], section: Mapping[str, Any] | None, tensors: Mapping[str, Tensor] | None
) -> Mapping[str, Any]:
    """Put what a checkpoint leaves out back in, from the module it is loaded into.

    Args:
        state: The checkpoint's tensors by plain name.
        section: The library's part of the checkpoint.
        tensors: The module's stored values by plain name; ``None`` when there is no module at hand.

    Returns:
        All tensors by plain name, in the module's order; of a weight under maps that was left out, the stored value.

    Raises:
        CheckpointError: The base is not at hand, or it is another one.
    """
    base = {} if section is None else section.get("base") or {}
    if not base:
        return state
    if tensors is None:
        raise CheckpointError(
            f"The checkpoint holds only the trained tensors, not {next(iter(base))} and {len(base) - 1} more tensors of its "
            "base. Build the model with its base weights and give it to base=, or use "
            "lightning_peft.load_from_checkpoint(ModelClass, path), whose class loads them."
        )
    check_base(base, tensors, tensors.__getitem__)
    everything = {**state, **{name: tensors[name].detach().clone() for name in base if name not in state}}
    return {name: everything[name] for name in [*(name for name in tensors if name in everything), *everything]}


def check_base(base: Digests, names: Collection[str], value: Callable[[str], Tensor]) -> None:
    """Refuse a base that is not the one a checkpoint was trained on.

    Args:
        base: Digests of what the checkpoint leaves out.
        names: Names of the base's tensors.
        value: Returns the stored value of a name.

    Raises:
        CheckpointError: It is another one.
    """
    wrong = [name for name, wanted in base.items() if name not in names or not is_still(value(name), wanted)]
    if wrong:
        raise CheckpointError(
            f"The checkpoint holds only tensors that were trained on another base: {wrong[0]} "
            f"{'is not in this model' if wrong[0] not in names else 'holds other values in this model'}"
            f"{f', and {len(wrong) - 1} more differ' if len(wrong) > 1 else ''}. "
            "Build the model with the base weights that it was trained from, before the checkpoint is loaded."
        )
