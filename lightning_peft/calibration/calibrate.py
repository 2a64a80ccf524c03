"""Calibrating a network block after block."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import Progress
from torch import nn

from lightning_peft.calibration.done_blocks import DoneBlocks, shapes
from lightning_peft.calibration.find_blocks import calls_seen, find_blocks, in_order
from lightning_peft.calibration.step_passes import Stage, StepPasses
from lightning_peft.capture.calibration_block import CalibrationBlock
from lightning_peft.capture.recorded_calls import RecordedCalls
from lightning_peft.contract import Contract, ordered
from lightning_peft.network.plain_tensors import overwrite
from lightning_peft.structure import journal
from lightning_peft.weights.maps import mapped_tensors, plain_tensors

GIB = 2**30


def calibrate(
    module: LightningModule,
    methods: Contract | Sequence[Contract],
    batches: Iterable[Any],
    *,
    blocks: str | Iterable[str] | None = None,
    stage: Stage | None = None,
    folder: str | Path | None = None,
    memory: int = GIB,
    progress: bool = True,
    **trainer: Any,
) -> list[str]:
    """Let methods act on a trained network, one block at a time, on what the blocks already done make of some batches.

    For each block the module's own evaluation step runs over all batches, whatever they look like, and what the block is
    called with is recorded; so nothing is assumed of how blocks follow each other. Then each method's
    :meth:`~lightning_peft.contract.Contract.calibrate` has its turn, in the order of lanes. A network of ``n`` blocks takes
    ``n + 1`` passes over the batches. The step runs in evaluation mode, from the same random numbers in every pass.

    Args:
        module: The module, without weight maps; changed in place.
        methods: Methods that override ``calibrate``.
        batches: A loader, or a list of batches as the module's step takes them; the same in every pass.
        blocks: Qualified names of lists, whose entries are the blocks, or of blocks; by default the lists of equal blocks.
        stage: Whose step runs: ``"validate"``, ``"test"`` or ``"predict"``; by default the first that the module defines.
        folder: Where a file is written when a block is done. A call with the same folder, methods and batches, on a module as
            it was at the beginning or as it was left, goes on at the next block, with the same result bit for bit.
        memory: Bytes of recorded inputs to keep in memory, 1 GiB by default; those of further calls wait on disk, in
            ``folder`` or in the system's folder for temporary files.
        progress: Whether to show a bar.
        **trainer: Arguments of the Trainer that runs the step, such as ``accelerator`` and ``precision``.

    Returns:
        Names of the blocks, in the order in which they were done.

    Raises:
        MisconfigurationException: A method does not calibrate, no block is found or called, weight maps stand on the module,
            the batches cannot be repeated, or a method changed the structure of a block without a journalled edit.
        CheckpointError: ``folder`` holds another calibration.
    """
    methods = ordered([methods] if isinstance(methods, Contract) else methods)
    _check(module, methods)
    passes = StepPasses(module, batches, stage, trainer)
    found = find_blocks(module, blocks)
    place = None if folder is None else Path(folder)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    with _evaluating(module), Progress(disable=not progress) as bar:
        task = bar.add_task("calibrate: finding the order of blocks", total=None)
        order = in_order(found, passes)
        done = DoneBlocks(place, module, order, methods, [passes.digest, passes.batches])
        first = done.restore()
        bar.update(task, total=len(order), completed=first)
        for position, name in enumerate(order[first:], start=first):
            bar.update(task, description=f"calibrate: {name}")
            before = journal.journal_of(module)
            with tempfile.TemporaryDirectory(dir=place) as spill:
                calls = RecordedCalls(memory, Path(spill))
                with _all_or_nothing(module, name):
                    _calibrate_block(module, methods, name, position, len(order), passes, calls)
            done.save(position, journal.journal_of(module)[len(before) :])
            bar.advance(task)
    return order


def _check(module: LightningModule, methods: Sequence[Contract]) -> None:
    if not methods:
        raise MisconfigurationException("methods= is empty. Pass a method that calibrates.")
    idle = next((method for method in methods if type(method).calibrate is Contract.calibrate), None)
    if idle is not None:
        raise MisconfigurationException(
            f"{idle.name} does not calibrate: {type(idle).__name__} has no calibrate(). Train with it instead: "
            f"Trainer(callbacks=[{type(idle).__name__}(...)])."
        )
    if next(mapped_tensors(module), None) is not None:
        raise MisconfigurationException("The module is under weight maps. Bake it first: lightning_peft.bake(module).")


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and give it its modes and its device back."""
    modes = {part: part.training for part in module.modules()}
    device = next((tensor.device for tensor in module.parameters()), None)
    module.eval()
    try:
        yield
    finally:
        for part in module.modules():
            part.training = modes.get(part, module.training)
        module.to(device)


@contextmanager
def _all_or_nothing(module: nn.Module, name: str) -> Iterator[None]:
    """Give a block back what it was when it could not be done, so that the module can be calibrated on."""
    begun = {key: tensor.detach().cpu().clone() for key, tensor in plain_tensors(module.get_submodule(name)).items()}
    edits = len(journal.journal_of(module))
    try:
        yield
    except BaseException:
        while len(journal.journal_of(module)) > edits:
            journal.take_back(module)
        for key, tensor in plain_tensors(module.get_submodule(name)).items():
            if key in begun and begun[key].shape == tensor.shape:
                overwrite(tensor, begun[key])
        raise


def _calibrate_block(
    module: LightningModule,
    methods: Sequence[Contract],
    name: str,
    position: int,
    count: int,
    passes: StepPasses,
    calls: RecordedCalls,
) -> None:
    with calls_seen(module.get_submodule(name), calls.record):
        passes.run()
    device = passes.trainer.strategy.root_device
    calls.device = device
    home = next((tensor.device for tensor in module.parameters()), None)
    for method in methods:
        part = module.get_submodule(name)
        had, edits = shapes(part), journal.journal_of(module)
        generator = torch.Generator().manual_seed(position)
        context = passes.trainer.precision_plugin.forward_context
        block = CalibrationBlock(name, part.to(device), module, position, count, calls, generator, context)
        with isolate_rng(), torch.no_grad():
            torch.manual_seed(position)
            method.calibrate(block)
        part.to(home)
        now = module.get_submodule(name).to(home)
        if shapes(now) != had and journal.journal_of(module) == edits:
            raise MisconfigurationException(
                f"{method.name} changed the names or shapes of the tensors in {name}, which no checkpoint could restore. "
                "Change structure with an edit: lightning_peft.structure.journal.edit(block.root, self.put(...))."
            )
