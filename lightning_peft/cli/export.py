"""`export`, and `report --before`: what needs the model's class and data beside a checkpoint, both from a recipe."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from rich.console import Console

from lightning_peft.atomic_files import whole
from lightning_peft.baking.bake import baked, read_checkpoint
from lightning_peft.baking.restore import restore
from lightning_peft.cli.beside import quiet
from lightning_peft.cli.console import Outcome, facts, grid
from lightning_peft.cli.file_commands import existing
from lightning_peft.cli.folders import check_writable
from lightning_peft.cli.launch import interruptible, launch, methods_in, quiet_lightning
from lightning_peft.cli.loading import recorded_build
from lightning_peft.cli.recipes import UsageError, find
from lightning_peft.measure.network_inputs import NetworkInputs
from lightning_peft.strategies.support import strategy_kind
from lightning_peft.structure import checkpoint as sections
from lightning_peft.structure import journal

ENDINGS = {"safetensors": "-baked", "onnx": ".onnx", "exported": ".pt2"}


def export(
    path: Path, form: str, out: Path | None, recipe: str | None, overrides: Sequence[str], *, trusted: bool = False
) -> Outcome:
    """Write a checkpoint's baked network in a portable form, compared with eager where it can run.

    Raises:
        CheckpointError: The file is no checkpoint, or does not fit the recipe's model.
        ExportError: The network cannot be exported faithfully.
        UsageError: There is no such file, or a recipe is needed and missing.
    """
    from lightning_peft.baking.baked_folder import save_baked
    from lightning_peft.baking.portable import to_exported, to_onnx

    target = out or path.with_name(path.stem + ENDINGS[form])
    check_writable(target.parent, "-o")
    path = existing(path)
    if form == "safetensors":
        if recipe is not None:
            raise UsageError("--recipe is for onnx and exported: safetensors are written from the file alone.")
        save_baked(path, target, trusted=trusted)
    else:
        if recipe is None:
            raise UsageError(
                f"--to {form} runs the network on an example: name the recipe it was trained with, --recipe RECIPE."
            )
        (module,), examples = _built(recipe, overrides, [path], trusted, batches=1)
        if form == "onnx":
            to_onnx(module, target, examples.inputs[0])
        else:
            program = to_exported(module, examples.inputs[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole(target) as part, part.open("wb") as file:
                torch.export.save(program, file)
    checked = [] if form == "safetensors" else ["example batch", "another batch size"]
    lines = _loading(form, target, path, trusted)
    if checked:
        exec("\n".join(lines), {})

    def show(console: Console) -> None:
        note = " and compared with eager on two batch sizes" if checked else ""
        console.print(f"Wrote [bold]{target}[/]{note}. Load it with:\n", soft_wrap=True)
        console.print("\n".join(f"    {line}" for line in lines), highlight=False, markup=False, soft_wrap=True)

    data = {"source": str(path), "target": str(target), "form": form, "compared_on": checked, "loading": lines}
    return Outcome(data, show)


def _loading(form: str, target: Path, source: Path, trusted: bool) -> list[str]:
    """Return the lines that load an exported file as ``net``, or into a ``net`` of the user's class."""
    place = repr(str(target.resolve()))
    if form == "onnx":
        return ["import onnxruntime", f"net = onnxruntime.InferenceSession({place}, providers=['CPUExecutionProvider'])"]
    if form == "exported":
        return ["import torch", f"net = torch.export.load({place}).module()"]
    build = recorded_build(read_checkpoint(source, trusted=trusted).get("hyper_parameters"))
    load = f"lightning_peft.load_baked(net, {place})"
    return ["import lightning_peft", *build, load if build else f"{load}  # net: built by your class"]


def deployment(
    path: Path,
    before: Path,
    recipe: str | None,
    overrides: Sequence[str],
    *,
    out: Path | None,
    device: str,
    trusted: bool = False,
) -> Outcome:
    """Measure a checkpoint's network beside that of another, on the recipe's test data, and write a report.

    Raises:
        CheckpointError: A file is no checkpoint, or does not fit the recipe's model.
        UsageError: There is no such file, or no recipe is named.
    """
    from lightning_peft.report.compare_deployments import compare_deployments

    folder = out or path.with_name(f"{path.stem}-deployment")
    check_writable(folder, "-o")
    path, before = existing(path), existing(before)
    if recipe is None:
        raise UsageError("--before runs both networks on test data: name the recipe they were trained with, --recipe RECIPE.")
    (one, other), examples = _built(recipe, overrides, [before, path], trusted)
    labelled = list(zip(examples.inputs, examples.labels, strict=True))
    batches = None
    if all(labels is not None for _, labels in labelled):
        batches = [_labelled(inputs, labels) for inputs, labels in labelled]
    command = [
        "lightning-peft",
        "report",
        str(path),
        "--before",
        str(before),
        "--recipe",
        recipe,
        "--device",
        device,
        *(["--trusted"] if trusted else []),
        *overrides,
    ]
    found = compare_deployments(
        one.to(device),
        other.to(device),
        examples.inputs[:4],
        batches,
        batch_sizes=[1, 32],
        made_by=shlex.join(command),
    )
    made = found.report()
    written = made.save(folder)

    def show(console: Console) -> None:
        speed = made.sections[1]
        console.print(facts(made.facts))
        console.print(f"\n{speed.text[0]}\n", highlight=False)
        console.print(grid(speed.tables[0]))
        console.print(f"\nReport [bold]{folder / 'report.html'}[/]", soft_wrap=True)

    return Outcome({**made.data, "out": str(folder), "files": [str(file) for file in written]}, show)


def _built(
    name: str, overrides: Sequence[str], paths: Sequence[Path], trusted: bool, batches: int | None = None
) -> tuple[list[LightningModule], NetworkInputs]:
    """Build the recipe's model once for each checkpoint, fill it, and see what its network is given in tests."""
    recipe, examples = find(name), NetworkInputs()

    def adjust(arguments: dict[str, Any]) -> None:
        quiet(arguments)
        arguments["callbacks"] = [examples]
        if batches is not None:
            arguments["limit_test_batches"] = batches

    quiet_lightning()
    cli = launch(recipe, overrides, methods_in(recipe, overrides), adjust)
    if strategy_kind(cli.trainer.strategy) != "single":  # examples are the same in one process
        cli.trainer = cli.instantiate_trainer(devices=1, num_nodes=1, strategy="auto")
    cli.model.configure_model()
    modules = [copy.deepcopy(cli.model) for _ in paths]
    base = cli.model.state_dict()
    for module, path in zip(modules, paths, strict=True):
        checkpoint = baked(read_checkpoint(path, trusted=trusted), base)
        restore(module, checkpoint["state_dict"], journal.read(sections.read(checkpoint)))
    with interruptible(cli.trainer):
        cli.trainer.test(modules[0], datamodule=cli.datamodule, verbose=False)
    if not examples.inputs:
        raise UsageError(f"The recipe {recipe.name} has no test batch to run the network on.")
    return modules, examples


def _labelled(inputs: Any, labels: Any) -> Any:
    return {**inputs, "labels": labels} if isinstance(inputs, dict) else (*inputs, labels)
