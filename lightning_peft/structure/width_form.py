"""The form of a recorded width edit, which may come from a damaged file."""

from __future__ import annotations

from lightning_peft.structure.axes import NEW, OLD, Axes, size
from lightning_peft.structure.edit_types import Recorded
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.in_place import is_changes


def check_form(edit: Recorded) -> None:
    """Refuse an edit that is not built as :func:`lightning_peft.structure.width_edit.width_edit` builds it.

    Raises:
        CheckpointError: Something is missing, of the wrong type, or disagrees with the sizes of the axes.
    """
    axes, tensors = edit.get("axes"), edit.get("tensors")
    fits = (
        isinstance(edit.get("path"), str)
        and isinstance(axes, dict)
        and all(isinstance(label, str) and _is_pair(pair) and 1 <= pair[0] <= pair[1] for label, pair in axes.items())
        and isinstance(tensors, dict)
        and all(isinstance(name, str) and _is_entry(entry, axes) for name, entry in tensors.items())
        and is_changes(edit.get("config"), (int, float, type(None)))
        and isinstance(edit.get("attributes"), dict)
        and all(
            isinstance(path, str) and is_changes(changes, (int, float, list)) for path, changes in edit["attributes"].items()
        )
    )
    if not fits:
        raise CheckpointError(
            "A recorded change of width is malformed: it needs 'path', 'axes', 'tensors', 'attributes' and 'config', with old "
            "and new sizes that agree."
        )


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(value) is int for value in pair)


def _is_entry(entry: object, axes: Axes) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dims"), list) or not isinstance(entry.get("tied", []), list):
        return False
    known = all(
        isinstance(dim, str) and dim and all(part.isdecimal() or part in axes for part in dim.split()) for dim in entry["dims"]
    )
    return known and all(
        entry.get(key) == [size(dim, axes, when) for dim in entry["dims"]] for key, when in (("from", OLD), ("to", NEW))
    )
