"""Edits of a module in training: weights, optimizers, averages, other methods and the strategy follow, or nothing changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.attaching import averaging, finetuning
from lightning_peft.attaching.map_groups import place_maps, place_parts
from lightning_peft.attaching.plan import network_of
from lightning_peft.attaching.trained import TrainedParameters
from lightning_peft.contract import Contract
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.optim.schedulers import FreshSchedule
from lightning_peft.strategies.support import rewrap
from lightning_peft.structure import carry, journal, put
from lightning_peft.structure.edit_types import PutEdit
from lightning_peft.structure.edits import Change, Edit, EditRequest
from lightning_peft.structure.part_slices import part_entries
from lightning_peft.structure.width_state import carry_optimizer_state
from lightning_peft.weights.maps import mapped_tensors, parameters_with_maps, plain_tensors, plain_values, set_plain_values
from lightning_peft.weights.parts import part_tensors


def edit_training(
    trainer: Trainer,
    module: LightningModule,
    methods: Sequence[Contract],
    growth: EditRequest,
    trained: TrainedParameters,
    schedules: Sequence[FreshSchedule] = (),
) -> Change:
    """Apply an edit between two optimizer steps.

    Args:
        trainer: The Trainer; its gradients must not be needed any more.
        module: The module.
        methods: All methods, in plan order.
        growth: The edit, and what becomes of values and optimizer state.
        trained: Freezes what of the edited module is not trained.
        schedules: The schedulers as they began.

    Returns:
        What changed.

    Raises:
        CheckpointError: The edit does not fit; nothing is changed then.
    """
    growth = replace(growth, edit=trainer.strategy.broadcast(growth.edit))  # rank 0 decides for all
    if growth.edit["op"] == "put":
        _check_put(module, methods, growth.edit)
    before = {} if growth.operator is None else plain_values(module)
    old = plain_tensors(module) | part_tensors(module)
    taken = averaging.averages(trainer)
    states = _resized_states(trainer.optimizers, old, growth, part_entries(module, growth.edit))
    with trained.lifted():  # what is copied must not be a copy that stays frozen
        change = journal.edit(module, growth.edit)
        if growth.operator is not None:
            set_plain_values(module, growth.operator(before, growth.edit, generator(growth.edit)))
        _release(module, change)
        for state, resized in states:
            state.update(resized)
        _carry_optimizers(trainer, module, change, growth, old)
        if growth.restart_schedulers:
            for schedule in schedules:
                schedule.restart()
        if change.edit.get("follow"):
            follow(trainer, module, methods, {id(tensor) for tensor in old.values()})
        for method in methods:
            method.structure_changed(module, change)

    def values(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if change.edit["op"] == "put":
            copies = put.values_after(module, change.edit, change.removed, plain)
        else:
            copies = {name: plain[source] for name in plain_tensors(module) if (source := change.source(name)) is not None}
        return copies | ({} if growth.operator is None else dict(growth.operator(plain, growth.edit, generator(growth.edit))))

    averaging.edit_averages(taken, trainer, module, change, values)  # copies what methods have just put on the module
    finetuning.follow_edit(trainer, module)
    rewrap(trainer)
    rank_zero_info(describe(module, growth.edit))
    return change


def _check_put(module: LightningModule, methods: Sequence[Contract], edit: PutEdit) -> None:
    """Refuse what would leave methods with a network, or with weight maps, that are no longer called."""
    path = edit["path"]
    network, _ = network_of(methods, module)
    if path == network or network.startswith(f"{path}."):
        raise MisconfigurationException(
            f"{edit['kind']} cannot replace {path}, the network that methods watch. Replace a layer within it."
        )
    leaves = put.rebuild(edit).inside is None
    mapped = next(mapped_tensors(put.layer_at(module, path)), None) if leaves else None
    if mapped is not None:
        raise MisconfigurationException(
            f"{edit['kind']} replaces {path}, whose {mapped.name} is under the weight map of {mapped.maps[0].owner}. Leave "
            f"the layer out of that method with exclude=[{path!r}]."
        )


def _release(module: LightningModule, change: Change) -> None:
    """Free what an edit leaves behind on the device; removed blocks are kept, for going back to an earlier checkpoint."""
    for part in (module, *change.removed.values()):
        for parameter in parameters_with_maps(part):
            parameter.grad = None  # of shapes, and in DDP in buckets, that are gone
    gone = set(map(id, _gone_parameters(module, change)))
    for block in change.removed.values():
        if all(id(parameter) in gone for parameter in parameters_with_maps(block)):
            block.to("cpu")


def generator(edit: Edit) -> torch.Generator:
    """The random numbers of an edit: the same on every rank, and for every copy of the module."""
    return torch.Generator().manual_seed(int(edit.get("seed", 0)))


def _carry_optimizers(
    trainer: Trainer, module: LightningModule, change: Change, growth: EditRequest, old: Mapping[str, Tensor]
) -> None:
    optimizers = trainer.optimizers
    pairs = _new_parameters(module, change, optimizers, old)
    joining = _trained_too(optimizers, pairs) if growth.train_new else pairs
    carry.join(optimizers, [config.scheduler for config in trainer.lr_scheduler_configs], joining)
    gone = _gone_parameters(module, change)
    if growth.optimizer_state == "reset":
        tensors = plain_tensors(module)
        resized = change.edit["tensors"] if change.edit["op"] in ("resize", "slice") else ()
        changed = {new for new, _ in pairs.values()} | {tensors[name] for name in resized} | {*gone}
        # An adversary's optimizer does not start anew when the network grows.
        carry.reset_states([optimizer for optimizer in optimizers if trained_by(optimizer) & changed])
    elif growth.optimizer_state == "copy":
        alike = {name: (new, source) for name, (new, source) in pairs.items() if new.shape == source.shape}
        carry.copy_states(optimizers, alike, restart_steps=growth.restart_steps)
    carry.leave(optimizers, gone)


def _trained_too(
    optimizers: Sequence[Optimizer], pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """New parameters with one to be trained like: their source, or the first that is trained where it is not."""
    trained = trained_by(*optimizers)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    first = next((parameter for group in groups for parameter in group["params"]), None)
    return {name: (new, source if source in trained or first is None else first) for name, (new, source) in pairs.items()}


def _gone_parameters(module: nn.Module, change: Change) -> list[nn.Parameter]:
    """Parameters of blocks that left, those of weight maps on them too; what another part of the module shares is not gone."""
    kept = set(map(id, module.parameters()))
    found = [p for block in change.removed.values() for p in parameters_with_maps(block) if id(p) not in kept]
    return list({id(parameter): parameter for parameter in found}.values())


def _new_parameters(
    module: LightningModule, change: Change, optimizers: Sequence[Optimizer], old: Mapping[str, Tensor]
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """New parameters with the parameter each was copied from, or is trained like, by name."""
    if change.edit["op"] == "put":
        trained = [*trained_by(*optimizers)]
        found = put.new_parameters(module, change.edit, change.copied, old, trained)
        return {name: (new, like) for name, new, like in found}
    pairs = {}
    for name, tensor in (plain_tensors(module) | part_tensors(module)).items():
        source = change.source(name)
        if source is not None and source in old and isinstance(tensor, nn.Parameter):
            pairs[name] = (tensor, old[source])
    return pairs  # type: ignore[return-value]


def _resized_states(
    optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor], growth: EditRequest, parts: Mapping[str, dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Optimizer states with what they become when the module is resized; made first, because not every state can follow."""
    edit = growth.edit
    if edit["op"] == "blocks" or edit["op"] == "put" or growth.optimizer_state == "reset":
        return []
    found = []
    whole: Any = {**edit, "tensors": {**edit["tensors"], **parts}}
    for name in whole["tensors"]:
        for optimizer in optimizers:
            if (state := optimizer.state.get(tensors[name])) is not None:
                resized = dict(state)
                carry_optimizer_state(resized, whole, name, growth.optimizer_state)
                found.append((state, resized))
    return found


def follow(trainer: Trainer, module: LightningModule, methods: Sequence[Contract], old: set[int]) -> None:
    """Let the other methods attach to new layers, and their parameters join the optimizers.

    Args:
        trainer: The Trainer; optimizers may not exist yet.
        module: The module, edited.
        methods: All methods, in plan order.
        old: Identities of the stored tensors there were before.
    """
    for method in methods:
        if method.weight_maps or method.parts:
            method.attach(module)
    for mapped in mapped_tensors(module):
        if id(mapped.stored) not in old:
            place_maps(trainer, mapped)
    place_parts(trainer, module)


def describe(module: nn.Module, edit: Edit) -> str:
    """Say what an edit did, for the log."""
    size = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    if edit["op"] == "blocks":
        return f"lightning_peft: {edit['path']} {edit['from']} -> {len(edit['sources'])} blocks, now {size:.2f} M parameters"
    if edit["op"] == "put":
        return f"lightning_peft: {edit['path']} is now under {edit['kind']}, now {size:.2f} M parameters"
    if edit["op"] == "slice":
        cut = sum(math.prod(entry["from"]) - math.prod(entry["to"]) for entry in edit["tensors"].values()) / 1e6
        return f"lightning_peft: {edit['path'] or type(module).__name__} lost {cut:.2f} M numbers, now {size:.2f} M parameters"
    axes = ", ".join(f"{axis} {old} -> {new}" for axis, (old, new) in edit["axes"].items() if old != new)
    return f"lightning_peft: {edit['path'] or type(module).__name__} {axes}, now {size:.2f} M parameters"
