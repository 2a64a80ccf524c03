"""What a cut of a layer's channels means for the parts beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.in_place import put
from lightning_peft.weights.parts import PlacedPart, part_tensors, placed_parts


def part_entries(
    module: nn.Module, edit: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> dict[str, dict[str, Any]]:
    """Describe the cut of every tensor of a part that follows the cut of its layer, as :func:`slices.slice_entry` does.

    Args:
        module: The module.
        edit: An edit of any kind; only a slice has such tensors.
        tensors: The parts' tensors by qualified name; those of the module by default.
    """
    if edit.get("op") != "slice":
        return {}
    found = {}
    tensors = part_tensors(module) if tensors is None else tensors
    for placed in placed_parts(module):
        for key, dims in (placed.part.follows or {}).items():
            name = f"{placed.name}.{key}"
            cuts = {own: _cut_of(placed, attribute, dim, edit) for own, (attribute, dim) in dims.items()}
            if name in tensors and any(cut is not None for cut in cuts.values()):
                found[name] = _entry(tensors[name].shape, cuts)
    return found


def put_parts(module: nn.Module, edit: Mapping[str, Any], value: Callable[[str, Tensor, Any], Tensor]) -> None:
    """Give every tensor of a part that follows an edit another value.

    Args:
        module: The module.
        edit: The edit.
        value: The new value of a tensor by its name, what it is now, and its entry.
    """
    entries = part_entries(module, edit)
    for placed in placed_parts(module):
        for key, tensor in placed.part.state_dict(keep_vars=True).items():
            name = f"{placed.name}.{key}"
            if name in entries:
                put(placed.part, key, tensor, value(name, tensor.detach(), entries[name]))


def _cut_of(placed: PlacedPart, attribute: str, dim: int, edit: Mapping[str, Any]) -> tuple[int, int, Any] | None:
    """Old size, new size and what is kept of a dimension of a layer's own tensor; ``None`` when it stays whole."""
    entry = _entry_of(placed, attribute, edit)
    whole = entry is None or entry["kept"][dim] is None
    return None if whole else (entry["from"][dim], entry["to"][dim], entry["kept"][dim])


def _entry_of(placed: PlacedPart, attribute: str, edit: Mapping[str, Any]) -> Any:
    """The cut of a layer's own tensor, which may go by the name of another that it is tied to."""
    name = f"{placed.path}.{attribute}" if placed.path else attribute
    if name in edit["tensors"]:
        return edit["tensors"][name]
    return next((entry for entry in edit["tensors"].values() if name in entry.get("tied", ())), None)


def _entry(shape: Sequence[int], cuts: Mapping[int, tuple[int, int, Any] | None]) -> dict[str, Any]:
    parts = [cuts.get(dim) or (size, size, None) for dim, size in enumerate(shape)]
    old, new, kept = zip(*parts, strict=True)
    return {"from": list(old), "to": list(new), "kept": list(kept)}


def check_parts(module: nn.Module, edit: Mapping[str, Any]) -> None:
    """Refuse an edit of sizes beside parts that do not say how they follow it.

    Raises:
        CheckpointError: A part stands beside a layer whose sizes change.
    """
    for placed in placed_parts(module):
        changed = [name for name in placed.layer._parameters if _entry_of(placed, name, edit) is not None]
        follows = placed.part.follows
        if changed and (follows is None or (follows and edit["op"] != "slice")):
            what = "cut" if edit["op"] == "slice" else "widened"
            raise CheckpointError(
                f"{placed.path}.{changed[0]} should be {what}, but the layer part {placed.part.kind!r} of "
                f"{placed.part.owner} beside it does not say how it follows. Leave the layer out of one of the two methods "
                f"with exclude=[{placed.path!r}], or bake first and change the structure in a fit of its own."
            )
