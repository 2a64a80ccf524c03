"""One training and test of a recipe in a folder of its own: finished ones are read back, killed ones continue."""

from __future__ import annotations

import shutil

from rich.console import Console

from lightning_peft.cli.beside import quiet
from lightning_peft.cli.folders import check_settings, digest, settings
from lightning_peft.cli.job import CURVES, RESULT, Job
from lightning_peft.cli.launch import launch, parse, quiet_lightning
from lightning_peft.cli.processes import processes_of, train_in_processes
from lightning_peft.cli.recipes import UsageError
from lightning_peft.cli.training import Training, printed_plan
from lightning_peft.report.trial import Trial


def preflight(job: Job) -> None:
    """Build what a job trains and resolve its plan, so that a mistake is answered before another job has cost time.

    Raises:
        UsageError: It cannot be built, or not in the processes that it asks for.
        MisconfigurationException: Its methods do not fit each other, the module or the strategy.
    """
    if job.kept:
        return
    quiet_lightning()
    cli = launch(job.recipe, job.arguments(), job.without, quiet)
    processes_of(cli.trainer)
    printed_plan(cli)


def train(job: Job, console: Console) -> Trial:
    """Do a job, or what is left of it, in as many processes as its Trainer asks for.

    Args:
        job: The job.
        console: Where to show progress.

    Returns:
        Its result, which is also in its folder.

    Raises:
        UsageError: The folder holds a run with other settings.
        RankError: One of several processes failed.
        KeyboardInterrupt: The user stopped it; the last checkpoint is in place.
    """
    quiet_lightning()
    made_with = settings(parse(job.recipe, job.arguments(), job.without), job.made_from)
    check_settings(job.folder, made_with, kept=job.kept)
    if job.finished:
        return _read(job, made_with)
    if not job.kept:  # what a run that failed early had logged
        shutil.rmtree(job.folder / CURVES, ignore_errors=True)
    training = Training(job, console)
    for sentence in training.overruled:
        console.print(f"  [dim]{sentence}[/]", highlight=False, soft_wrap=True)
    processes = processes_of(training.trainer)
    if not processes:
        return training.run(made_with)
    del training  # each process builds its own
    train_in_processes(job, made_with, processes, console)
    return _read(job, made_with)


def _read(job: Job, made_with: str) -> Trial:
    trial = Trial.read(job.folder / RESULT)
    if trial.made_with not in ("", digest(made_with)):
        raise UsageError(f"{job.folder / RESULT} is of a run with other settings. Choose another folder with --out.")
    return trial
