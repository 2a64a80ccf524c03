"""Checkpoints that are saved when a fit is over and the module is an ordinary one again."""

from __future__ import annotations

import weakref
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft.attach import method_records
from lightning_peft.attach.saving import structure_record
from lightning_peft.contract import methods_of, ordered
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import journal, part_states
from lightning_peft.structure.carry import group_names
from lightning_peft.weights import stash

_GROUPS: weakref.WeakKeyDictionary[nn.Module, list[list[list[str]]]] = weakref.WeakKeyDictionary()
"""Names in the optimizers of the last fit of an edited module, as they were with its maps on."""


def note_groups(trainer: Trainer, module: LightningModule) -> None:
    """Note how the optimizers of an edited module are sorted; call before its maps are taken off."""
    if journal.journal_of(module):
        _GROUPS[module] = group_names(module, trainer.optimizers)


def complete(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Give a checkpoint saved after a fit the training-time tensors, which left the module when the fit ended."""
    stashed = stash.peek(module)
    edits = journal.journal_of(module)
    parts = stash.peek_parts(module)
    if files.KEY in checkpoint or not (stashed or parts or edits):
        return
    state = checkpoint["state_dict"]
    for name, tensor in stashed.items():
        files.training_state(state, name, tensor.value, tensor.states)
    methods = ordered(methods_of(trainer.callbacks))  # type: ignore[attr-defined]
    records = {name: tensor.records for name, tensor in stashed.items()}
    checkpoint[files.KEY] = files.section(records, [method_records.describe(method) for method in methods])
    records_of_parts = {
        path: [{**record, "state": state} for record, state in zip(held.records, held.states, strict=True)]
        for path, held in parts.items()
    }
    weights = {part_states.weight_name(path): held.value for path, held in parts.items() if held.value is not None}
    checkpoint[files.KEY] |= part_states.section_of(records_of_parts, weights)
    if edits:
        checkpoint[files.KEY] |= structure_record(module, _GROUPS.get(module, []))
