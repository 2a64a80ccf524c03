"""What the entries of a list are called that an edit of blocks changes."""

from __future__ import annotations

from typing import Any

from lightning_peft.network.block_lists import Numbering
from lightning_peft.structure.errors import CheckpointError


def numbering_of(edit: Any) -> Numbering:
    """How an edit says that entries are called.

    Raises:
        CheckpointError: It is malformed.
    """
    recorded = edit.get("numbering", ["", 0])
    fits = isinstance(recorded, list) and [type(value) for value in recorded] == [str, int]
    if not fits or recorded[1] < 0 or "." in recorded[0]:
        raise CheckpointError(f"A recorded change of {edit.get('path')} is malformed: 'numbering' must be a word and a number.")
    return Numbering(*recorded)


def block_name(edit: Any, place: int) -> str:
    """Qualified name of the entry at a position of the list that an edit changes.

    Example:
        >>> block_name({"path": "encoder.layers", "numbering": ["layer_", 1]}, 2), block_name({"path": "h"}, 2)
        ('encoder.layers.layer_3', 'h.2')
    """
    return f"{edit['path']}.{numbering_of(edit).name(place)}"
