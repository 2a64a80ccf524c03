"""One training and test of a recipe in a folder of its own: finished ones are read back, killed ones continue."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console

from lightning_peft.atomic_files import whole
from lightning_peft.attaching.plan import plan
from lightning_peft.cli.beside import LastEpoch, quiet, stand_beside
from lightning_peft.cli.folders import check_settings, digest, settings
from lightning_peft.cli.launch import RecipeCLI, interruptible, launch, parse, quiet_lightning
from lightning_peft.cli.progress import EpochLines, ForwardMeter, RandomState, Stopwatch
from lightning_peft.cli.recipes import Recipe, UsageError
from lightning_peft.contract import methods_of, ordered
from lightning_peft.measure.change_recorder import ChangeRecorder
from lightning_peft.measure.confidence import ConfidenceRecorder, reliability_bins
from lightning_peft.measure.flop_meter import FlopMeter
from lightning_peft.report.trial import Trial

RESULT, CURVES = "trial.json", "curves"


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
        made_from: What its result depends on besides recipe and overrides; see :func:`lightning_peft.cli.folders.settings`.
        rehearsal: Whether only to see if it works, and to leave nothing outside of its folder.
    """

    recipe: Recipe
    overrides: Sequence[str]
    folder: Path
    checkpoint: Path
    name: str
    without: Sequence[str] = ()
    seed: int | None = None
    trusted: bool = False
    made_from: Sequence[str] = ()
    rehearsal: bool = False

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).is_file()

    @property
    def kept(self) -> bool:
        """Whether there is anything to go on from: its result or a checkpoint."""
        return self.finished or self.checkpoint.is_file()

    def arguments(self) -> list[str]:
        """Return its LightningCLI arguments, seed included."""
        return [*self.overrides, *([] if self.seed is None else ["--seed_everything", str(self.seed)])]


def preflight(job: Job) -> None:
    """Build what a job trains and resolve its plan, so that a mistake is answered before another job has cost time.

    Raises:
        UsageError: It cannot be built.
        MisconfigurationException: Its methods do not fit each other or the module.
    """
    if job.kept:
        return
    quiet_lightning()
    _printed_plan(launch(job.recipe, job.arguments(), job.without, quiet))


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
    quiet_lightning()
    made_with = settings(parse(job.recipe, job.arguments(), job.without), job.made_from)
    check_settings(job.folder, made_with, kept=job.kept)
    if job.finished:
        return _read(job, made_with)
    if not job.kept:  # what a run that failed early had logged
        shutil.rmtree(job.folder / CURVES, ignore_errors=True)
    stopwatch, meter, confidence, forward = Stopwatch(), FlopMeter(), ConfidenceRecorder(), ForwardMeter()
    changes = ChangeRecorder()
    lines = EpochLines(console, job.name, stopwatch)
    own = [stopwatch, meter, RandomState(), confidence, forward, changes, lines, LastEpoch(job.checkpoint)]
    overruled: list[str] = []

    def adjust(arguments: dict[str, Any]) -> None:
        said = stand_beside(arguments, own, job.folder, CURVES, terminal=console.is_terminal, rehearsal=job.rehearsal)
        overruled.extend(said)

    cli = launch(job.recipe, job.arguments(), job.without, adjust)
    for sentence in overruled:
        console.print(f"  [dim]{sentence}[/]", highlight=False, soft_wrap=True)
    printed = _printed_plan(cli)
    _fit(cli, job)
    with interruptible(cli.trainer):
        results = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    parameters = list(cli.model.parameters())
    trial = Trial(
        name=job.name,
        seed=seed_of(cli),
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
        calibration_errors={name: list(pair) for name, pair in confidence.table().items()},
        forward_flops=forward.flops,
        learnt=changes.learnt.as_data(),
        notes=overruled,
        made_with=digest(made_with),
    )
    trial.write(job.folder / RESULT)
    return trial


def _fit(cli: RecipeCLI, job: Job) -> None:
    last = job.checkpoint if job.checkpoint.is_file() else None
    with interruptible(cli.trainer):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last, weights_only=not job.trusted)
    if not job.checkpoint.is_file():  # no epoch came to its end, as with max_epochs 0
        with whole(job.checkpoint) as part:
            cli.trainer.save_checkpoint(part)


def _read(job: Job, made_with: str) -> Trial:
    trial = Trial.read(job.folder / RESULT)
    if trial.made_with not in ("", digest(made_with)):
        raise UsageError(f"{job.folder / RESULT} is of a run with other settings. Choose another folder with --out.")
    return trial


def seed_of(cli: RecipeCLI) -> int | None:
    """Return the seed a recipe was built with; ``None`` where it asked for none."""
    seed = cli.config.seed_everything
    return None if seed is False or seed is None else int(seed)


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
