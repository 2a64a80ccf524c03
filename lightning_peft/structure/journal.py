"""The journal: every edit a module has been through, in order, so that a checkpoint can be loaded into a new instance.

It is kept beside the module, not in it, and outlives the run: a module that was grown stays grown, and whatever saves it later
must say so.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_peft.network.deep_copy import deep_copy
from lightning_peft.structure import edits, foresight
from lightning_peft.structure.edits import Change, Edit
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.put import shells

FORMAT = 1

_JOURNALS: weakref.WeakKeyDictionary[nn.Module, list[Change]] = weakref.WeakKeyDictionary()


def journal_of(module: nn.Module) -> list[Edit]:
    """Return the edits a module has been through, oldest first."""
    return [change.edit for change in _JOURNALS.get(module, ())]


def changes_of(module: nn.Module) -> list[Change]:
    """Return what those edits did, oldest first."""
    return list(_JOURNALS.get(module, ()))


def set_changes(module: nn.Module, changes: Sequence[Change]) -> None:
    """Let a module have been through these changes and no others."""
    if changes:
        _JOURNALS[module] = list(changes)
    else:
        _JOURNALS.pop(module, None)


def write(edit_list: Sequence[Edit]) -> dict[str, Any]:
    """Return a journal for a checkpoint."""
    return {"version": FORMAT, "edits": list(edit_list)}


def read(section: Mapping[str, Any] | None) -> list[Edit]:
    """Return the journal in the library's part of a checkpoint; empty when there is none.

    Raises:
        CheckpointError: Unknown version or malformed.
    """
    journal = None if section is None else section.get("journal")
    if journal is None:
        return []
    version = journal.get("version") if isinstance(journal, dict) else None
    if version != FORMAT:
        raise CheckpointError(
            f"The checkpoint's journal of structural changes has format {version!r}; this version of lightning-peft reads "
            f"format {FORMAT}. Use the version that wrote it."
        )
    edit_list = journal.get("edits")
    if not isinstance(edit_list, list) or not all(isinstance(edit, dict) for edit in edit_list):
        raise CheckpointError("The checkpoint's journal of structural changes is malformed: 'edits' must be a list of dicts.")
    return edit_list


def edit(module: nn.Module, what: Edit) -> Change:
    """Apply an edit and write it into the module's journal.

    Raises:
        CheckpointError: It does not fit; nothing is changed then.
    """
    change = edits.apply(module, what)
    _JOURNALS.setdefault(module, []).append(change)
    return change


def take_back(module: nn.Module) -> Change:
    """Undo the last edit of a module, and strike it from the journal."""
    change = _JOURNALS[module].pop()
    edits.undo(module, change)
    return change


def hand_on(module: nn.Module, twin: nn.Module) -> None:
    """Copy the edit history to a copy of the module, without the values needed to undo it.

    Replaced layers are handed on as empty shells, because nothing else says what they were.
    """
    _JOURNALS[twin] = [
        Change(change.edit, removed=shells(change.removed) if change.edit["op"] == "put" else {})
        for change in changes_of(module)
    ]


def replay(module: nn.Module, journal: Sequence[Edit], state: Mapping[str, Any]) -> bool:
    """Give a module the structure a checkpoint was saved with.

    What both went through stays; edits the checkpoint does not know are undone. A module that was built with the final
    structure is taken as it is.

    Args:
        module: The module; values do not matter, the checkpoint's come next.
        journal: Edits of the checkpoint.
        state: Its tensors by training-time name.

    Returns:
        Whether the structure changed.

    Raises:
        CheckpointError: The edits do not fit this module; it is left as it was.
    """
    own = journal_of(module)
    common = next((n for n, (a, b) in enumerate(zip(own, journal, strict=False)) if a != b), min(len(own), len(journal)))
    if len(own) == len(journal) == common:
        return False
    if not own and journal and _has_structure(module, journal, state):
        _JOURNALS[module] = edits.adopt(module, journal)
        return False
    if len(own) == common:
        edits.check(module, journal[common])
    foresight.check_sizes(journal, state)
    if len(own) > common:
        _rehearse(module, common, journal)
    for _ in range(len(own) - common):
        take_back(module)
    done = 0
    try:
        for what in journal[common:]:
            edit(module, what)
            done += 1
    except CheckpointError:
        for _ in range(done):
            take_back(module)
        raise
    return True


def _rehearse(module: nn.Module, common: int, journal: Sequence[Edit]) -> None:
    """Try on a copy, because a module that was trained in this process would lose what undone edits had added."""
    twin = deep_copy(module)
    for change in reversed(_JOURNALS[module][common:]):
        # What comes back is changed by the edits that follow; what was noted belongs to the module, not to its copy.
        edits.undo(twin, copy.deepcopy(replace(change, noted=[])))
    for what in journal[common:]:
        edits.apply(twin, what)


def _has_structure(module: nn.Module, journal: Sequence[Edit], state: Mapping[str, Any]) -> bool:
    """Whether a module that went through no edit has the checkpoint's tensors already, because its class was told to."""
    try:
        edits.check(module, journal[0])
    except CheckpointError:
        own = {name: tensor.shape for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
        return own == {name: tensor.shape for name, tensor in state.items() if isinstance(tensor, Tensor)}
    return False
