"""The section of a checkpoint for weight maps and methods, saved and loaded beside the module's own."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft.attaching import averaging, method_records
from lightning_peft.attaching.editing import follow
from lightning_peft.attaching.trained import TrainedParameters
from lightning_peft.compose.lanes import Lane
from lightning_peft.compose.run import Run
from lightning_peft.contract import Contract
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import journal, part_states, partial, plain_state
from lightning_peft.structure.carry import group_names
from lightning_peft.structure.earlier_parts import upgraded
from lightning_peft.structure.edit_types import Edit
from lightning_peft.structure.snapshot import ModuleSnapshot
from lightning_peft.weights.mapped_layer import stored_key
from lightning_peft.weights.maps import mapped_tensors, plain_tensors
from lightning_peft.weights.parts import placed_parts


def structure_record(module: LightningModule, groups: list[list[list[str]]]) -> dict[str, Any]:
    """Describe what a module has become, and in which order its optimizers hold its parameters, for a checkpoint."""
    return {"journal": journal.write(journal.journal_of(module)), "groups": groups}


_BASES: weakref.WeakKeyDictionary[nn.Module, partial.Digests] = weakref.WeakKeyDictionary()
"""Digests of what modules held when their first fit began."""


def write(inner: Callable[..., Any], checkpoint: dict[str, Any], section: dict[str, Any], beside: Mapping[str, Any]) -> None:
    """Write a checkpoint's section, after the module's own hook, which may take tensors out of it or exchange some.

    Args:
        inner: That hook.
        checkpoint: The checkpoint, its tensors by plain name.
        section: The library's part of it.
        beside: What training needs beside those tensors, by training-time name.
    """
    checkpoint[files.KEY] = section  # tells hooks of the library that stand behind this one that it is taken care of
    inner(checkpoint)
    tensors = plain_state.section_tensors(checkpoint["state_dict"], beside, section["weights"], section.get("base", ()))
    checkpoint[files.KEY] = section | tensors


def note_base(module: LightningModule, methods: Iterable[Contract]) -> None:
    """Take digests of a module whose training is about to begin, if its checkpoints shall leave out what it does not change.

    Of several fits in one process the first one's base counts: it is what the module's class will build again.
    """
    if module not in _BASES and any(method.checkpoint == "trained" for method in methods):
        before = {mapped.name: mapped.chain.pristine for mapped in mapped_tensors(module, every_name=True)}
        found = {name: tensor if before.get(name) is None else before[name] for name, tensor in plain_tensors(module).items()}
        _BASES[module] = partial.digests(found)


def leave_out_base(
    module: LightningModule,
    methods: Iterable[Contract],
    checkpoint: dict[str, Any],
    section: dict[str, Any],
    beside: dict[str, Any],
) -> None:
    """Take out of a checkpoint what training did not change, if a method asks for that; the section gets its digests.

    Args:
        module: The module.
        methods: All methods.
        checkpoint: The checkpoint, its tensors by plain name.
        section: The library's part of it.
        beside: What training needs beside those tensors, by training-time name.
    """
    base = _BASES.get(module)
    if base is None or not any(method.checkpoint == "trained" for method in methods):
        return
    under_parts = section.get(part_states.WEIGHTS, {})
    left = partial.leave_out(checkpoint["state_dict"], beside, section["weights"], base, under_parts)
    if isinstance(current := checkpoint.get("current_model_state"), dict):  # beside an average, what is trained
        keys = {stored_key(name) if name in section["weights"] else name: name for name in base}
        same = {key: name for key, name in keys.items() if key in current and partial.is_still(current[key], base[name])}
        checkpoint["current_model_state"] = {key: value for key, value in current.items() if key not in same}
        left |= {name: base[name] for name in same.values()}
    section["base"] = left


def described(
    trainer: Trainer,
    module: LightningModule,
    checkpoint: dict[str, Any],
    methods: Sequence[dict[str, Any]],
    stashed: Mapping[str, list[dict[str, Any]]] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a checkpoint the names and weights of an ordinary one.

    Args:
        trainer: The Trainer that saves.
        module: The module.
        checkpoint: The checkpoint, its tensors by training-time name.
        methods: Records of the methods.
        stashed: Records of weight maps that were on the module in the fit and are off by now, by name.

    Returns:
        The library's section, and what training needs beside the checkpoint's tensors.
    """
    section = files.section_of(module, methods)
    state = checkpoint["state_dict"]  # an averaging callback's, when there is one
    state.update(plain_state.masks_of(checkpoint.get("current_model_state", {}), section["weights"]))
    seen = plain_state.seen_values(module, state, trainer.precision_plugin.forward_context())
    checkpoint["state_dict"], beside = plain_state.split(state, seen)
    section["weights"] |= stashed or {}
    return section | described_parts(trainer, module, checkpoint, beside, section), beside


def described_parts(
    trainer: Trainer,
    module: LightningModule,
    checkpoint: dict[str, Any],
    beside: dict[str, Any],
    section: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the layer parts that belong to the state dict, and those of the module and its averages beside them.

    Lightning's WeightAveraging has put the average into the state dict by now.
    """
    averages = averaging.averaged_modules(trainer)
    owner = averaging.shown(trainer) if "current_model_state" in checkpoint else module
    found = part_states.write(checkpoint["state_dict"], beside, owner or module, section["weights"])
    if found and averages:
        found[part_states.COPIES] = [part_states.states_of(each) for each in (module, *averages)]
    return found


class CheckpointHooks:
    """Handlers that stand in front of a module's ``on_save_checkpoint`` and ``on_load_checkpoint``.

    Args:
        run: The run; its module has its methods attached.
        methods: All methods, in plan order.
        trained: Freezes what is not trained.
        fitting: Whether the Trainer fits, so that an optimizer would be restored too.

    Attributes:
        groups: Names of the parameters in each group of each optimizer when the loaded checkpoint was saved, if that differs
            from what ``configure_optimizers`` would list.
        before: The module before the checkpoint was loaded, until the run is under way.
    """

    def __init__(self, run: Run, methods: Sequence[Contract], trained: TrainedParameters, *, fitting: bool) -> None:
        self.groups: list[list[list[str]]] | None = None
        self.before: ModuleSnapshot | None = None
        self._trainer = run.trainer
        self._module = run.module
        self._methods = methods
        self._trained = trained
        self._fitting = fitting
        if fitting:
            note_base(run.module, methods)

    def save(self, inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Give the checkpoint the names and weights of an ordinary one, which the module's own hook knows, and the section."""
        records = [method_records.describe(method) for method in self._methods]
        section, beside = described(self._trainer, self._module, checkpoint, records)
        if journal.journal_of(self._module):
            groups = group_names(self._module, self._trainer.optimizers) if self._fitting else []
            section |= structure_record(self._module, groups)
        leave_out_base(self._module, self._methods, checkpoint, section, beside)
        write(inner, checkpoint, section, beside)

    def load(self, inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Check the file, and translate weights that were saved under other maps.

        Whatever fails from here to the start of the run, here or elsewhere: the hub gives the module back what it was.

        Raises:
            CheckpointError: The file is damaged, or its optimizer state belongs to other maps.
        """
        checkpoint.update(upgraded(checkpoint))
        section = files.read(checkpoint)
        parts = part_states.read(section)
        if self._fitting:
            files.check_order(checkpoint, section)
        edits, groups = journal.read(section), self._groups(checkpoint, section)
        saved = self._saved_states(checkpoint, section)
        files.check_names(checkpoint["state_dict"])
        saved_tensors = checkpoint["state_dict"]
        given = plain_state.with_versions(self._with_base(checkpoint, section), saved_tensors)
        edited = plain_state.edited(given, section)
        if self._fitting:
            plain_state.refuse_edited(edited)
        checkpoint["state_dict"] = plain_state.joined(given, section, edited)
        self.before = ModuleSnapshot(self._module)
        self._restructure(checkpoint, edits, section)
        self.groups = groups
        tensors = list(mapped_tensors(self._module, every_name=True))
        files.check_tensors(checkpoint["state_dict"], self._module)
        for method, state in saved:
            method_records.check(method, state, self._module)
        other = section is None or bool(files.difference(section, tensors) or part_states.difference(parts, self._module))
        if other:
            self._check_adoption(checkpoint, section)
        else:
            plain_state.check_map_states(checkpoint["state_dict"], self._module)
            files.restore_switches(section or {}, tensors)
            self._load_parts(section or {}, parts)
        if not self._fitting:
            for method, state in saved:
                method_records.restore(method, state, self._module)
        if section is not None and section["version"] < plain_state.PLAIN:
            self._load_earlier(inner, checkpoint, section, other=other)
        else:
            self._load_plain(inner, checkpoint, section, given, other=other)
        checkpoint["state_dict"] = plain_state.with_versions(checkpoint["state_dict"], saved_tensors)

    def _load_earlier(
        self, inner: Callable[..., Any], checkpoint: dict[str, Any], section: dict[str, Any], *, other: bool
    ) -> None:
        """Make the tensors of a file that holds training-time names those of the module; ``other``: of other maps."""
        if other:
            checkpoint["state_dict"] = files.bake_state_dict(checkpoint["state_dict"], section)
            files.mount_state_dict(checkpoint["state_dict"], self._module)
        else:
            checkpoint["state_dict"] = part_states.beside(checkpoint["state_dict"], section)
        inner(checkpoint)

    def _load_plain(
        self,
        inner: Callable[..., Any],
        checkpoint: dict[str, Any],
        section: dict[str, Any] | None,
        given: Mapping[str, Any],
        *,
        other: bool,
    ) -> None:
        """Show the module's own hook an ordinary file, and make its tensors those of the module."""
        checkpoint["state_dict"] = copy.copy(given)
        inner(checkpoint)
        left = checkpoint["state_dict"]
        if other and section is not None and section.get("base"):  # of these it has the stored value, not the weight
            baked = files.bake_state_dict(plain_state.joined(left, section, plain_state.edited(left, section)), section)
            left = {**left, **{name: baked[name] for name in section["weights"] if name in section["base"]}}
        if other:
            state = dict(left)
            part_states.merge(state, section or {}, part_states.in_file(section))
        else:  # the module's own hook may have exchanged what the stored values belong to
            joined = plain_state.joined(left, section, plain_state.edited(left, section))
            state = part_states.beside(joined, section or {})
        files.mount_state_dict(state, self._module)
        checkpoint["state_dict"] = state

    def _with_base(self, checkpoint: dict[str, Any], section: dict[str, Any] | None) -> Mapping[str, Any]:
        """Return the tensors of a checkpoint by plain name, with what it leaves out taken from the module."""
        own = plain_tensors(self._module)
        given = partial.filled(checkpoint["state_dict"], section, own)
        if section is not None and section.get("base") and isinstance(checkpoint.get("current_model_state"), dict):
            keys = {stored_key(name) if name in section["weights"] else name: name for name in section["base"]}
            missing = {key: own[name].detach().clone() for key, name in keys.items()}
            checkpoint["current_model_state"] = {**missing, **checkpoint["current_model_state"]}
        return given

    def _load_parts(self, section: Mapping[str, Any], parts: part_states.PartRecords) -> None:
        """Give the module's parts and those of its averages what they held."""
        shown = {path: [record["state"] for record in records] for path, records in parts.items()}
        modules = [self._module, *(averaging.averaged_modules(self._trainer) if self._fitting else [])]
        beside = section.get(part_states.COPIES, [])
        states = [shown] * len(modules)
        if self._fitting and len(beside) == len(modules):  # a module whose fit was over when it was saved had none on it
            states = [each or shown for each in beside]
        for each, module in zip(states, modules, strict=True):
            part_states.check_states(each, module)
        for each, module in zip(states, modules, strict=True):
            part_states.restore(each, module)
            part_states.restore_switches(parts, module)

    def _groups(self, checkpoint: dict[str, Any], section: dict[str, Any] | None) -> list[list[list[str]]] | None:
        """Names in the optimizers, which differ from what ``configure_optimizers`` lists when the module was edited."""
        if section is None or not section.get("journal") or not checkpoint.get("optimizer_states"):
            return None
        return files.read_groups(section)

    def _saved_states(self, checkpoint: dict[str, Any], section: dict[str, Any] | None) -> list[tuple[Contract, Any]]:
        """States to restore by method; Lightning restores them for a fit only, an evaluation needs those that say what is.

        Raises:
            MisconfigurationException: One is missing or malformed.
        """
        callbacks = checkpoint.get("callbacks")
        if callbacks is None:  # a file of weights only
            return []
        if not isinstance(callbacks, Mapping):
            raise files.CheckpointError(f'checkpoint["callbacks"] is a {type(callbacks).__name__}, not a dict of states.')
        recorded = {record["name"] for record in section["methods"]} if section is not None else set()
        wanted = [m for m in self._methods if self._fitting or m.lane in (Lane.STRUCTURE, Lane.REPORT)]
        found = []
        for method in wanted:
            if method.state_key not in callbacks and method.name not in recorded:
                continue
            state = callbacks.get(method.state_key)
            method_records.check(method, state)
            found.append((method, state))
        return found

    def _restructure(self, checkpoint: dict[str, Any], edits: list[Edit], section: dict[str, Any] | None) -> None:
        """Give the module the structure of the file, so that its weights load strictly and its optimizers by position."""
        old = {id(tensor) for tensor in plain_tensors(self._module).values()}
        with self._trained.lifted():
            restructured = journal.replay(self._module, edits, checkpoint["state_dict"])
            followed = not edits or any(edit.get("follow") for edit in edits) or self._maps_follow(edits, section)
            if restructured and followed:
                follow(self._trainer, self._module, self._methods, old)
        if restructured and self._fitting:
            averaging.rebuild(self._trainer, self._module)

    def _maps_follow(self, edits: list[Edit], section: dict[str, Any] | None) -> bool:
        """Whether weight maps were on modules that edits put in place, because a later fit began with them there."""
        if section is None or not any(edit["op"] == "put" for edit in edits):
            return False
        mapped = {tensor.name for tensor in mapped_tensors(self._module, every_name=True)}
        return not mapped.issuperset(section["weights"])

    def _check_adoption(self, checkpoint: dict[str, Any], section: dict[str, Any] | None) -> None:
        """Refuse to resume an optimizer on weights that were trained under other maps; an evaluation may load them."""
        tensors = list(mapped_tensors(self._module, every_name=True))
        attached = tensors or next(placed_parts(self._module), None) is not None
        if self._fitting and (attached or section) and checkpoint.get("optimizer_states"):
            parts = part_states.read(section)
            reason = files.difference(section or {"weights": {}}, tensors) or part_states.difference(parts, self._module)
            if reason is not None:
                raise files.CheckpointError(
                    f"This checkpoint cannot be resumed with these methods: {reason}, so its optimizer state would land on the "
                    "wrong parameters. Resume with the callbacks it was saved with, or start anew from its weights: "
                    "model = lightning_peft.load_from_checkpoint(ModelClass, path), then fit without ckpt_path."
                )
