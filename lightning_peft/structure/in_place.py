"""Changing sizes in place: tensors under the parameters and buffers that stay, and the numbers layers note about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.noted_numbers import agrees, note, noted
from lightning_peft.weights.maps import split_name


def put(module: nn.Module, name: str, tensor: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer another value of another shape; a parameter stays the same object, without its gradient.

    Args:
        module: The module that holds it.
        name: Its plain qualified name.
        tensor: What it is now.
        value: What it shall hold.
    """
    if not isinstance(tensor, nn.Parameter):
        path, attribute = split_name(name)
        module.get_submodule(path)._buffers[attribute] = value
        return
    tensor.grad = None
    # A graph that is still alive, say of a logged loss, keeps a gradient accumulator of the old shape, which the next backward
    # would run into. torch drops it when the dtype changes, not when the shape does.
    tensor.data = torch.empty(0, dtype=torch.float32 if tensor.dtype == torch.float64 else torch.float64, device=tensor.device)
    tensor.data = value


def set_attributes(module: nn.Module, attributes: Mapping[str, Mapping[str, Any]], when: int) -> None:
    """Write what layers note about their sizes.

    Args:
        module: The module.
        attributes: Old and new value by attribute, by layer.
        when: 0 for the old values, 1 for the new.
    """
    for path, changes in attributes.items():
        layer = module.get_submodule(path)
        for attribute, pair in changes.items():
            value = pair[when]
            note(layer, attribute, tuple(value) if isinstance(value, list) else value)


def check_attributes(module: nn.Module, path: str, changes: Mapping[str, Any]) -> None:
    """Refuse numbers that a layer does not note, or notes otherwise.

    Raises:
        CheckpointError: There is no such layer, number or value.
    """
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"{type(module).__name__} has no submodule {path!r}, whose width was changed.") from None
    for attribute, (old, new) in changes.items():
        value = noted(layer, attribute)
        plain = list(value) if isinstance(value, tuple) else value
        # a float, an int or a tuple of ints, noted by the module itself, that keeps its type
        sort = [type(part) for part in plain] if isinstance(plain, list) else type(plain)
        known = sort in (int, float) or (isinstance(sort, list) and set(sort) == {int})
        like = sort == ([type(part) for part in new] if isinstance(new, list) else type(new))
        if attribute.startswith("_") or not known or not like or not agrees(layer, attribute, plain, old):
            raise CheckpointError(
                f"A change of width was made on {path}.{attribute} = {old}; this {type(module).__name__} has {value!r}. "
                "Build the model with the arguments it was trained with."
            )


def is_changes(changes: object, kinds: tuple[type, ...]) -> bool:
    """Whether a value from a file holds pairs of old and new values of these kinds by name."""
    return isinstance(changes, dict) and all(
        isinstance(key, str) and isinstance(pair, list) and len(pair) == 2 and all(type(value) in kinds for value in pair)
        for key, pair in changes.items()
    )
