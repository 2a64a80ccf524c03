"""The structure a journal leads to, checked against the tensors of the same file before any of it is built."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.structure.block_names import block_name, numbering_of
from lightning_peft.structure.edit_types import Recorded
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.weights.maps import plain_name

_MOST = 64  # how many times as large as the file a network may have been on the way


def check_sizes(edits: Sequence[Recorded], state: Mapping[str, Any]) -> None:
    """Refuse a journal that leads to other sizes than those of the tensors it was saved with.

    Edits that are malformed are left to those who apply them, which they are refused by before they are built.

    Args:
        edits: The journal.
        state: Tensors by training-time name.

    Raises:
        CheckpointError: See above.

    Example:
        >>> from torch import ones
        >>> edit = {"op": "blocks", "path": "h", "from": 1, "sources": [0] * 3, "block": ["Linear:12345678"]}
        >>> check_sizes([edit], {"h.0.weight": ones(2), "h.1.weight": ones(2), "h.2.weight": ones(2)})
        >>> check_sizes([edit], {"h.0.weight": ones(2)})
        Traceback (most recent call last):
            ...
        lightning_peft.structure.errors.CheckpointError: The checkpoint's journal leads to 3 blocks of h, ...
    """
    shapes = {plain_name(name): tensor.shape for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for place, edit in enumerate(edits):
        later = [str(other.get("path")) for other in edits[place + 1 :] if other.get("op") in ("blocks", "put")]
        if edit.get("op") == "blocks":
            _check_blocks(edit, shapes, later)
            if edit.get("shared") and not any(str(edit.get("path")).startswith(path) for path in later):
                _check_shared(edit, state)
        elif isinstance(edit.get("tensors"), dict):
            renamed = tuple(f"{path}." for path in later)
            touched = {name for other in edits[place + 1 :] for name in _tensors(other)}
            final = {
                name: entry for name, entry in _tensors(edit).items() if not name.startswith(renamed) and name not in touched
            }
            _check_shapes(_tensors(edit), final, shapes)


def _check_blocks(edit: Recorded, shapes: Mapping[str, Sequence[int]], later: Sequence[str]) -> None:
    path, sources, kinds = edit.get("path"), edit.get("sources"), edit.get("block")
    if not isinstance(path, str) or not isinstance(sources, list) or not isinstance(kinds, list):
        return
    held = _count(shapes, edit)
    last = not any(path == other or path.startswith(f"{other}.") for other in later)
    # An activation that stands in the list has no tensors, and the last entries may be such.
    exact = last and not any(str(kind).endswith(":00000000") for kind in kinds)
    if (exact and len(sources) != held) or (last and len(sources) < held) or len(sources) > _MOST * max(held, _before(edit)):
        raise CheckpointError(
            f"The checkpoint's journal leads to {len(sources)} blocks of {path}, but the file holds tensors of {held}. It is "
            "damaged or was edited; use another checkpoint."
        )


def _check_shared(edit: Recorded, state: Mapping[str, Any]) -> None:
    """Refuse to let one block stand where the file has blocks of different weights."""
    path, sources = edit.get("path"), edit.get("sources")
    for place, source in enumerate(sources if isinstance(sources, list) else ()):
        first = sources.index(source)  # type: ignore[union-attr]
        own, same = block_name(edit, place), block_name(edit, first)
        for name, tensor in state.items():
            if first == place or not name.startswith(f"{own}.") or not isinstance(tensor, Tensor):
                continue
            other = state.get(same + name.removeprefix(own))
            if isinstance(other, Tensor) and (other.shape != tensor.shape or not torch.equal(other, tensor)):
                raise CheckpointError(
                    f"The checkpoint's journal says that positions {first} and {place} of {path} hold one block, but the file "
                    "holds different weights for them. It is damaged or was edited; use another checkpoint."
                )


def _before(edit: Recorded) -> int:
    """Blocks before an edit, as far as a file can be trusted: no more than a thousand."""
    count = edit.get("from")
    return min(count, 1000) if type(count) is int else 0


def _count(shapes: Iterable[str], edit: Recorded) -> int:
    """Blocks of a list that have tensors in the file, by the largest number among them."""
    numbering = numbering_of(edit)
    pattern = re.compile(re.escape(f"{edit['path']}.{numbering.prefix}") + r"(\d+)\.")
    last = max((int(match[1]) for name in shapes if (match := pattern.match(name))), default=numbering.first - 1)
    return 1 + last - numbering.first


def _tensors(edit: Recorded) -> dict[str, Any]:
    tensors = edit.get("tensors")
    return {name: entry for name, entry in tensors.items() if isinstance(entry, dict)} if isinstance(tensors, dict) else {}


def _check_shapes(entries: Mapping[str, Any], final: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    most = _MOST * max(1, sum(math.prod(shape) for shape in shapes.values()))
    for name, entry in entries.items():
        to = entry.get("to")
        if not isinstance(to, list) or not all(type(size) is int and size > 0 for size in to):
            return
        held = shapes.get(name)
        if math.prod(to) > most or (name in final and held is not None and list(held) != to):
            raise CheckpointError(
                f"The checkpoint's journal leads to {name} of shape {to}, but the file holds "
                f"{'no such tensor' if held is None else list(held)}. It is damaged or was edited; use another checkpoint."
            )
