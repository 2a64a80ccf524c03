"""One training and test of a recipe in a folder of its own: finished ones are read back, killed ones continue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console

from lightning_peft.attach.confidence import ConfidenceRecorder, reliability_bins
from lightning_peft.attach.flop_meter import FlopMeter
from lightning_peft.cli.launch import RecipeCLI, interruptible, launch, parse, quiet_lightning
from lightning_peft.cli.recipes import Recipe, UsageError
from lightning_peft.cli.watch import EpochLines, RandomState, Stopwatch
from lightning_peft.compose.plan import plan
from lightning_peft.export.report_trial import Trial
from lightning_peft.method import methods_of, ordered

CONFIG, RESULT, CURVES = "config.yaml", "trial.json", "curves"


@dataclass(frozen=True)
class Job:
    """A training to be done.

    Attributes:
        recipe: The recipe.
        overrides: LightningCLI arguments that win over it.
        folder: Where its files go.
        checkpoint: Where its last checkpoint goes.
        name: Name in tables and plots.
        without: Class names of methods to leave out.
        seed: Seed of everything; ``None`` leaves it to the recipe.
        trusted: Whether Python objects in its checkpoint may be rebuilt, should it continue.
    """

    recipe: Recipe
    overrides: Sequence[str]
    folder: Path
    checkpoint: Path
    name: str
    without: Sequence[str] = ()
    seed: int | None = None
    trusted: bool = False

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).is_file()


def train(job: Job, console: Console) -> Trial:
    """Do a job, or what is left of it.

    Args:
        job: The job.
        console: Where to show progress.

    Returns:
        Its result, which is also in its folder.

    Raises:
        UsageError: The folder holds a run with other settings.
        KeyboardInterrupt: The user stopped it; the last checkpoint is in place.
    """
    stopwatch, meter, confidence = Stopwatch(), FlopMeter(), ConfidenceRecorder()
    lines = EpochLines(console, job.name, stopwatch)
    own: list[Callback] = [stopwatch, meter, RandomState(), confidence, lines, _last_checkpoint(job.checkpoint)]
    if console.is_terminal:
        own.append(RichProgressBar(leave=False))

    def adjust(arguments: dict[str, Any]) -> None:
        arguments["callbacks"] += own
        arguments["logger"] = CSVLogger(job.folder, name=CURVES, flush_logs_every_n_steps=20)
        arguments["default_root_dir"] = job.folder
        arguments["enable_progress_bar"] = console.is_terminal
        arguments["enable_model_summary"] = False

    quiet_lightning()
    seed = [] if job.seed is None else ["--seed_everything", str(job.seed)]
    overrides = [*job.overrides, *seed]
    check_config(job.folder, parse(job.recipe, overrides, job.without))
    if job.finished:
        return Trial.read(job.folder / RESULT)
    cli = launch(job.recipe, overrides, job.without, adjust)
    printed = _printed_plan(cli)
    _fit(cli, job)
    results = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    parameters = list(cli.model.parameters())
    trial = Trial(
        name=job.name,
        seed=int(cli.config.seed_everything or 0),
        methods=[
            {"method": type(method).__name__, "name": method.name, "config": method.config()}
            for method in ordered(methods_of(cli.trainer.callbacks))  # type: ignore[attr-defined]
        ],
        plan=printed,
        metrics={name: float(value) for result in results for name, value in result.items()},
        seconds=stopwatch.total(),
        flops=float(meter.total),
        epochs=cli.trainer.current_epoch,
        steps=cli.trainer.global_step,
        parameters=sum(parameter.numel() for parameter in parameters),
        nonzero=sum(int(parameter.count_nonzero()) for parameter in parameters),
        calibration=reliability_bins(confidence.confidence, confidence.correct) if confidence.confidence else [],
    )
    trial.write(job.folder / RESULT)
    return trial


def _fit(cli: RecipeCLI, job: Job) -> None:
    last = job.checkpoint if job.checkpoint.is_file() else None
    with interruptible(cli.trainer):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last, weights_only=not job.trusted)


def _last_checkpoint(path: Path) -> ModelCheckpoint:
    """Keep the state at the end of the last whole epoch, the point from which a resumed run repeats nothing."""
    return ModelCheckpoint(
        dirpath=path.parent,
        filename=path.stem,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def _printed_plan(cli: RecipeCLI) -> str:
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    if not list(methods_of(callbacks)):
        return ""
    try:
        return str(plan(cli.model, callbacks))
    except MisconfigurationException:
        if is_overridden("configure_model", cli.model):  # the module is not complete before the run
            return ""
        raise


def check_config(folder: Path, cli: RecipeCLI) -> None:
    """Write the full configuration of a new run; refuse to continue one that has another.

    Raises:
        UsageError: The folder holds a run with other settings.
    """
    path = folder / CONFIG
    now = cli.parser.dump(cli.config, skip_none=False)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(now)
        return
    then = path.read_text()
    if then == now:
        return
    changed = [line.strip() for line in now.splitlines() if line not in then.splitlines()]
    raise UsageError(
        f"{folder} holds a run with other settings; changed are: {'; '.join(changed[:4]) or 'lines left out'}. Repeat its "
        "overrides to continue it, or choose another folder with --out."
    )
