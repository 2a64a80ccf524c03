"""Width edits: networks whose axes (stream, heads, hidden units) get more units, while every name stays.

An edit is plain data: it changes shapes and the numbers that layers and configurations note about them, in this process or,
replayed from a checkpoint, in the next. ``width_map`` declares a network, ``width_edit`` makes the edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.structure.axes import NEW, OLD, Axes, is_old, resized
from lightning_peft.structure.bounds import check_bounds
from lightning_peft.structure.edit_types import Recorded, ResizeEdit, ResizeEntry
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.in_place import check_attributes, put, set_attributes
from lightning_peft.structure.width_form import check_form
from lightning_peft.weights.maps import plain_tensors


def check_resize(module: nn.Module, edit: Recorded) -> None:
    """Refuse an edit that does not fit, before anything is touched.

    Raises:
        CheckpointError: It is malformed, or was made on a module with other shapes, attributes or ties.
    """
    check_form(edit)
    try:
        module.get_submodule(edit["path"])
    except AttributeError:
        raise CheckpointError(f"{type(module).__name__} has no submodule {edit['path']!r}, which was grown.") from None
    tensors = plain_tensors(module)
    for name, entry in edit["tensors"].items():
        if name not in tensors or list(tensors[name].shape) != entry["from"]:
            now = f"has {list(tensors[name].shape)}" if name in tensors else "has no such tensor"
            raise CheckpointError(
                f"A change of width was made on {name} of shape {entry['from']}; this {type(module).__name__} {now}. Build the "
                "model with the arguments it was trained with."
            )
        for other in entry.get("tied", ()):
            if tensors.get(other) is not tensors[name]:
                raise CheckpointError(f"{other} was tied to {name} when the width was changed and is not now. Tie them again.")
    for path, changes in edit["attributes"].items():
        check_attributes(module, path, changes)
    check_bounds(module, edit)
    for key, (old, new) in edit["config"].items():
        if (old is not None and type(old) is not type(new)) or not list(_configs(module, edit, key, old)):
            raise CheckpointError(f"A change of width was made on a configuration with {key}={old}; this model has none.")


def resize(module: nn.Module, edit: ResizeEdit) -> None:
    """Give a module the sizes of a checked edit, in place.

    Parameters stay the same objects, so optimizers and ties hold; their gradients go. Old coordinates keep their values, new
    ones are zero until an operator fills them, so that :func:`undo_resize` loses nothing.
    """
    _apply(module, edit, NEW, lambda value, entry: resized(value, entry["dims"], edit["axes"]))


def undo_resize(module: nn.Module, edit: ResizeEdit) -> None:
    """Give a module the sizes it had before an edit; old coordinates keep the values they have now."""
    _apply(module, edit, OLD, lambda value, entry: _narrow(value, entry["dims"], edit["axes"]))


def _narrow(value: Tensor, dims: Sequence[str], axes: Axes) -> Tensor:
    for position, dim in enumerate(dims):
        value = value.index_select(position, is_old(dim, axes).nonzero().flatten().to(value.device))
    return value


@torch.no_grad()
def _apply(module: nn.Module, edit: ResizeEdit, when: int, change: Callable[[Tensor, ResizeEntry], Tensor]) -> None:
    # Both ways through one function: `when` picks the old or the new of every pair, so that undoing writes back exactly what
    # applying has changed. Numbers that layers and configurations note come last, and configurations are found by the value
    # they note now, because several modules of a network may share one.
    tensors = plain_tensors(module)
    for name, entry in edit["tensors"].items():
        put(module, name, tensors[name], change(tensors[name].detach(), entry))
    set_attributes(module, edit["attributes"], when)
    for key, pair in edit["config"].items():
        for config in list(_configs(module, edit, key, pair[1 - when])):
            setattr(config, key, pair[when])
    if "width" in edit["axes"]:
        pair = edit["axes"]["width"]
        _set_features(module.get_submodule(edit["path"]), pair[1 - when], pair[when])


def _configs(module: nn.Module, edit: Recorded, key: str, value: object) -> Iterator[Any]:
    """Distinct configurations of the network's modules that note ``key=value``."""
    layers = module.get_submodule(edit["path"]).modules()
    for config in {id(config): config for layer in layers if (config := vars(layer).get("config")) is not None}.values():
        noted = vars(config) if hasattr(config, "__dict__") else {}
        if key in noted and type(noted[key]) is type(value) and noted[key] == value:
            yield config


def _set_features(network: nn.Module, before: int, after: int) -> None:
    """Rewrite the channels in timm's list of feature maps."""
    features = vars(network).get("feature_info")
    if isinstance(features, list) and all(isinstance(entry, dict) and entry.get("num_chs") == before for entry in features):
        network.feature_info = [{**entry, "num_chs": after} for entry in features]  # type: ignore[assignment]
