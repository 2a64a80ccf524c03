"""Edits: changes of a module's structure as plain data, applied live, replayed on resume, and undone.

An edit describes structure only: which blocks a list holds, which sizes tensors have, which of their coordinates stay, what
stands in a layer's place. Values
come from an operator when it is applied live and from the checkpoint when it is replayed, so both lead to the same module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_peft.structure import depth, put, slices, width
from lightning_peft.structure.block_names import block_name
from lightning_peft.structure.block_positions import Noted
from lightning_peft.structure.bounds import may_scale
from lightning_peft.structure.edit_types import BlocksEdit, PutEdit, Recorded
from lightning_peft.structure.edit_types import Edit as Edit
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.part_slices import check_parts

Operator: TypeAlias = Callable[[Mapping[str, Tensor], Edit, torch.Generator], Mapping[str, Tensor]]
"""Plain values before an edit, by qualified name, to values after it; what is not returned stays as the edit left it."""


@dataclass(frozen=True)
class EditRequest:
    """An edit a method asks for, and what is to become of values and optimizer.

    Attributes:
        edit: The edit.
        operator: Gives new tensors their values; ``None`` keeps what the edit copied.
        optimizer_state: ``"reset"``: every parameter starts anew; ``"copy"``: new coordinates get the state of their source;
            ``"pad"``: new coordinates start from zero, old ones keep their state.
        restart_steps: Set the step counts of copied states to 0.
        restart_schedulers: Let every scheduler begin again.
        train_new: Train new tensors whose source is not trained, too, like the first that is.
    """

    edit: Edit
    operator: Operator | None = None
    optimizer_state: Literal["reset", "copy", "pad"] = "pad"
    restart_steps: bool = False
    restart_schedulers: bool = False
    train_new: bool = False


@dataclass
class Change:
    """The effect of an edit on a module, by plain qualified name.

    Attributes:
        edit: The edit.
        renamed: Old prefix of a moved block or layer to its new prefix, for each of the prefixes it had; of a replaced layer
            the old name of every tensor that went on to its new name.
        copied: Prefix of a new block to the old prefix of the block it was copied from; of a replaced layer the name of a new
            tensor to that of the one it is trained like.
        removed: Blocks and layers that left, by old prefix; they keep their tensors, so that the edit can be undone.
        cut: What left each sliced tensor, by name, so that the edit can be undone.
        noted: Gives back what was noted about blocks before the edit.
    """

    edit: Edit
    renamed: dict[str, str] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    removed: dict[str, nn.Module] = field(default_factory=dict)
    cut: slices.Cut = field(default_factory=dict)
    noted: Noted = field(default_factory=list)

    def new_name(self, name: str) -> str | None:
        """Return what a tensor is called now; ``None`` when it was removed."""
        if self.edit["op"] == "put":
            return _name_after_put(self.edit, self.renamed, name)
        prefix, rest = split_block(self.edit, name)
        if rest is None or prefix in self.renamed:
            return name if rest is None else f"{self.renamed[prefix]}.{rest}"
        return None if prefix in self.removed else name

    def source(self, name: str) -> str | None:
        """Return the old name of the tensor that a new one was copied from; ``None`` when it is not new."""
        if self.edit["op"] == "put":
            return self.copied.get(name)
        prefix, rest = split_block(self.edit, name)
        return f"{self.copied[prefix]}.{rest}" if rest is not None and prefix in self.copied else None

    def old_name(self, name: str) -> str:
        """Return what a tensor that is not new was called before."""
        prefix, rest = split_block(self.edit, name)
        old = next((old for old, new in self.renamed.items() if new == prefix), prefix)
        return name if rest is None else f"{old}.{rest}"

    def new_value(self, name: str, value: Tensor) -> Tensor:
        """Return what an old tensor's value, or an average of it, becomes; only a slice changes it."""
        entry = self.edit["tensors"].get(name) if self.edit["op"] == "slice" else None
        return value if entry is None or list(value.shape) != entry["from"] else slices.narrow(value, entry["kept"])


def split_block(edit: Edit, name: str) -> tuple[str, str | None]:
    """Split a tensor's name into the prefix of its block and the rest, which is ``None`` outside the edited blocks.

    Example:
        >>> split_block({"op": "blocks", "path": "model.h"}, "model.h.3.attn.weight")
        ('model.h.3', 'attn.weight')
    """
    start = f"{edit['path']}."
    if edit["op"] != "blocks" or not name.startswith(start):
        return "", None
    index, _, rest = name.removeprefix(start).partition(".")
    return f"{start}{index}", rest or None


def _name_after_put(edit: PutEdit, renamed: Mapping[str, str], name: str) -> str | None:
    for old, new in renamed.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    gone = any(name.startswith(f"{place}.") for place in (edit["path"], *edit["also"]))
    return None if gone else name


def check(module: nn.Module, edit: Recorded) -> None:
    """Refuse an edit that does not fit a module, before anything is touched.

    Raises:
        CheckpointError: The edit is malformed or was made on another structure.
    """
    op = edit.get("op") if isinstance(edit, dict) else None
    if op == "blocks":
        depth.check_blocks(module, edit)
    elif op == "resize":
        width.check_resize(module, edit)
        check_parts(module, edit)
    elif op == "slice":
        slices.check_slice(module, edit)
    elif op == "put":
        put.check_put(module, edit)
    else:
        raise CheckpointError(
            f"A recorded change of structure has the operation {op!r}, which this version of lightning-peft does not know. "
            "Upgrade it, or bake the checkpoint with the version that wrote it."
        )


def apply(module: nn.Module, edit: Edit) -> Change:
    """Change a module's structure in place.

    New blocks are copies of their sources, in values too; resized tensors keep their ``nn.Parameter`` object and are zero.

    Raises:
        CheckpointError: See :func:`check`.
    """
    check(module, edit)
    if edit["op"] == "resize":
        width.resize(module, edit)
        return Change(edit)
    if edit["op"] == "slice":
        return Change(edit, cut=slices.cut(module, edit))
    if edit["op"] == "put":
        return Change(edit, *put.put(module, edit))
    renamed, copied, removed, noted = depth.set_blocks(module, edit)
    return Change(edit, renamed, copied, removed, noted=noted)


def adopt(module: nn.Module, journal: Sequence[Edit]) -> list[Change]:
    """Treat a module already built with the final structure as if the journal had been applied.

    It gets the numbers its class cannot know: LEMON scales the epsilon of norms, and copies of blocks inherit that.

    Raises:
        CheckpointError: An edit is malformed; the module is left as it was.
    """
    try:
        numbers = _numbers(journal)
        layers = {path: module.get_submodule(path) for path, _ in numbers}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint's journal of structural changes is malformed, or belongs to another model: {error!r}."
        ) from error
    for (path, key), (old, new) in numbers.items():
        if getattr(layers[path], key, None) == old and may_scale(module, path, key, new):
            setattr(layers[path], key, new)
    return [Change(edit) for edit in journal]


def _numbers(journal: Sequence[Edit]) -> dict[tuple[str, str], list[float]]:
    """Attributes that edits changed, by path and name: their first value and their last."""
    numbers: dict[tuple[str, str], list[float]] = {}
    for edit in journal:
        if edit["op"] == "blocks":
            numbers = {(path, key): pair for (old, key), pair in numbers.items() for path in _places(edit, old)}
            continue
        if edit["op"] == "put":
            moved = {old: _place_after_put(edit, old) for old, _ in numbers}
            numbers = {(path, key): pair for (old, key), pair in numbers.items() if (path := moved[old]) is not None}
            continue
        for path, changes in edit["attributes"].items():
            for key, (old, new) in changes.items():
                if isinstance(new, float):
                    numbers[path, key] = [numbers.get((path, key), [old])[0], new]
    return numbers


def _places(edit: BlocksEdit, path: str) -> list[str]:
    """Where the layers are, after an edit of blocks, that were one layer before."""
    prefix, rest = split_block(edit, f"{path}.")
    if rest is None and not prefix:
        return [path]
    tail = path.removeprefix(prefix)
    return [
        f"{block_name(edit, place)}{tail}" for place, source in enumerate(edit["sources"]) if block_name(edit, source) == prefix
    ]


def _place_after_put(edit: PutEdit, path: str) -> str | None:
    """Where a layer is after a put; ``None`` when it left."""
    inside = put.rebuild(edit).inside
    places = (edit["path"], *edit["also"])
    renamed = {} if inside is None else {place: f"{place}.{inside}" for place in places}
    return None if inside is None and path in places else _name_after_put(edit, renamed, path)


def undo(module: nn.Module, change: Change) -> None:
    """Give a module the structure it had before an edit; what was removed comes back as it was.

    A change made in another process has nothing at hand: copies of blocks and zeros take its place, for a checkpoint to fill.
    """
    if change.edit["op"] == "resize":
        width.undo_resize(module, change.edit)
    elif change.edit["op"] == "slice":
        slices.mend(module, change.edit, change.cut)
    elif change.edit["op"] == "put":
        put.take_out(module, change.edit, change.removed)
    else:
        depth.undo_blocks(module, change.edit, change.removed, change.noted)
