"""Checkpoints that are saved when a fit is over and the module is an ordinary one again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft.attaching import averaging, method_records
from lightning_peft.attaching.saving import described, described_parts, leave_out_base, structure_record, write
from lightning_peft.capture.shim import Shim
from lightning_peft.contract import methods_of, ordered
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import journal, part_states, plain_state
from lightning_peft.structure.carry import group_names
from lightning_peft.weights import stash
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.parts import placed_parts

_GROUPS: weakref.WeakKeyDictionary[nn.Module, list[list[list[str]]]] = weakref.WeakKeyDictionary()
"""Names in the optimizers of the last fit of an edited module, as they were with its maps on."""


def note_groups(trainer: Trainer, module: LightningModule) -> None:
    """Note how the optimizers of an edited module are sorted; call before its maps are taken off.

    Nothing is noted of a training that ended in the middle of an edit, when optimizers still hold what was there before.
    """
    if journal.journal_of(module):
        with contextlib.suppress(MisconfigurationException):
            _GROUPS[module] = group_names(module, trainer.optimizers)


class LastHook(Shim):
    """Stands in front of a module's ``on_save_checkpoint`` for one save.

    Lightning asks callbacks first, in the order of their list. What is written once all of them have spoken, averaging ones
    above all, does not depend on that order.

    Args:
        trainer: The Trainer that saves.
        module: The module, plain.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        super().__init__(module, "on_save_checkpoint", self._save)

    def _save(self, inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        self.remove()
        listed = ordered(methods_of(self._trainer.callbacks))  # type: ignore[attr-defined]
        stashed = stash.peek(self._module)
        weights = {name: tensor.records for name, tensor in stashed.items()}
        average = self._average(checkpoint)
        methods = [method_records.describe(method) for method in listed]
        if average is None:
            kept, beside = described(self._trainer, self._module, checkpoint, [], weights)
            beside |= plain_state.stored_beside(checkpoint["state_dict"], files.training_tensors(stashed))
            section = {**kept, **files.section(kept["weights"], methods)}
        else:
            section = files.section(files.section_of(average, [])["weights"] | weights, methods)
            beside = _separate_average(checkpoint, section, files.training_tensors(stashed))
            if self._keeps_parts():
                section |= described_parts(self._trainer, self._module, checkpoint, beside, section)
        if journal.journal_of(self._module):
            section |= structure_record(self._module, _GROUPS.get(self._module, []))
        section |= part_states.together(section, _stashed_parts(stash.peek_parts(self._module)))
        leave_out_base(self._module, listed, checkpoint, section, beside)
        write(inner, checkpoint, section, beside)

    def _keeps_parts(self) -> bool:
        return any(True for _ in placed_parts(self._module))

    def _average(self, checkpoint: Mapping[str, Any]) -> nn.Module | None:
        """The copy of the module that an averaging callback has put in its place, when maps are still on that."""
        if "current_model_state" not in checkpoint:
            return None
        copies = averaging.averaged_modules(self._trainer)
        return next((copy for copy in copies if any(True for _ in mapped_tensors(copy))), None)


def _stashed_parts(parts: Mapping[str, stash.StashedParts]) -> dict[str, Any]:
    """Entries of the section for layer parts that left the module when the fit ended, in its weights by now."""
    records = {
        path: [{**record, "state": state} for record, state in zip(held.records, held.states, strict=True)]
        for path, held in parts.items()
    }
    name = part_states.tensor_name
    weights = {name(path, key): value for path, held in parts.items() for key, value in held.values.items()}
    merged = [name(path, key) for path, held in parts.items() for key in held.into if key not in held.values]
    return part_states.section_of(records, weights, merged)


def _separate_average(
    checkpoint: dict[str, Any], section: Mapping[str, Any], trained: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Part the tensors of an averaged copy, whose masks stand where they stood when the copy was made."""
    state, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    for name, tensors in trained.items():
        state.update(plain_state.masks_of(tensors, [name]))
        current.pop(name, None)
        current.update(tensors)
    baked = files.bake_state_dict(state, section)
    checkpoint["state_dict"], beside = plain_state.split(state, {name: baked[name] for name in section["weights"]})
    return beside


def complete(trainer: Trainer, module: LightningModule) -> None:
    """Give a checkpoint saved after a fit the training-time tensors, which left the module when the fit ended.

    Called by every method in the Trainer while the checkpoint is made.
    """
    if isinstance(vars(module).get("on_save_checkpoint"), LastHook):
        return
    followed = any(True for copy in averaging.copies(trainer) for _ in mapped_tensors(copy))
    if followed or stash.peek(module) or stash.peek_parts(module) or journal.journal_of(module):
        LastHook(trainer, module).install()
