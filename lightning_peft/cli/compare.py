"""`compare`: an ablation of a recipe over seeds, one method or more left out at a time."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lightning_peft import registry
from lightning_peft.cli.console import Outcome, grid
from lightning_peft.cli.folders import held
from lightning_peft.cli.interrupts import AGAIN, going_on
from lightning_peft.cli.job import CURVES, Job
from lightning_peft.cli.launch import methods_in
from lightning_peft.cli.recipes import Recipe, UsageError, check_seeds, find_for
from lightning_peft.cli.trial import train
from lightning_peft.report.comparison import Comparison, comparison_report, cost_table, metric_table
from lightning_peft.report.curves import Curves, read_curves
from lightning_peft.report.reach import reach_tables
from lightning_peft.report.trial import Trial

FULL, DENSE = "full", "dense"


def compare(
    name: str,
    overrides: Sequence[str],
    without: Sequence[Sequence[str]],
    console: Console,
    *,
    each: bool = False,
    dense: bool = False,
    seeds: int = 3,
    out: Path | None = None,
    trusted: bool = False,
) -> Outcome:
    """Train the full recipe and each variant with every seed; finished trainings are read back, killed ones continue.

    Args:
        name: Recipe name or path.
        overrides: LightningCLI arguments, for all variants.
        without: Methods to leave out, one list a variant.
        console: Where to show progress.
        each: Also one variant for every method.
        dense: Also a variant without any.
        seeds: Seeds 0 to ``seeds - 1``.
        out: Folder for everything; by default ``runs/compare/<recipe>``.
        trusted: Whether Python objects in checkpoints may be rebuilt when a training continues.

    Raises:
        UsageError: No such recipe or method, nothing to compare, or a folder used with other settings.
    """
    check_seeds(seeds)
    if any(word.partition("=")[0] == "--seed_everything" for word in overrides):
        raise UsageError("compare sets the seed of each training itself: choose how many with --seeds.")
    recipe = find_for("run", name)
    plans = variants(methods_in(recipe, overrides), without, each=each, dense=dense)
    out = out or Path("runs") / "compare" / recipe.name
    command = _command(name, overrides, without, each, dense, seeds) + (" --trusted" if trusted else "")
    console.print(f"[bold]{recipe.name}[/]  {len(plans)} variants x {seeds} seeds in {out}", highlight=False)
    with held(out), going_on(lambda: AGAIN):
        return _compare(recipe, overrides, plans, out, console, seeds, command, trusted=trusted)


def _compare(
    recipe: Recipe,
    overrides: Sequence[str],
    plans: Mapping[str, Sequence[str]],
    out: Path,
    console: Console,
    seeds: int,
    command: str,
    *,
    trusted: bool,
) -> Outcome:
    trials: dict[str, list[Trial]] = {}
    curves: dict[str, list[Curves]] = {}
    for seed in range(seeds):  # seeds outside, so that an early look at the results is a fair one
        for label, left_out in plans.items():
            job = replace(_job(recipe, overrides, out, label, left_out, seed), trusted=trusted)
            trials.setdefault(label, []).append(_one(job, console))
            curves.setdefault(label, []).append(read_curves(job.folder / CURVES))
    comparison = Comparison(recipe.name, recipe.monitor, trials, command, curves)
    reach = comparison.reach()
    report = comparison_report(comparison)
    files = report.save(out)

    def show(console: Console) -> None:
        scores = (metric_table(comparison, metric) for metric in comparison.metrics())
        for table in (*scores, cost_table(comparison), *(reach_tables(reach) if reach else ())):
            console.print()
            console.print(grid(table))
        console.print(f"\nReport [bold]{out / 'report.html'}[/]", soft_wrap=True)

    return Outcome({**report.data, "out": str(out), "files": [str(path) for path in files]}, show)


def variants(
    methods: Sequence[str], without: Sequence[Sequence[str]], *, each: bool = False, dense: bool = False
) -> dict[str, list[str]]:
    """Name the variants of an ablation and the methods each leaves out.

    Raises:
        UsageError: A method is not in the recipe, or there is nothing to compare.

    Example:
        >>> variants(["A", "B"], [["A"]], dense=True)
        {'full': [], 'without A': ['A'], 'dense': ['A', 'B']}
    """
    if not methods:
        raise UsageError("The recipe uses no method, so there is nothing to leave out.")
    groups = [list(group) for group in without] + ([[method] for method in methods] if each else [])
    found: dict[str, list[str]] = {FULL: []}
    for group in groups:
        for method in group:
            if method not in methods:
                raise UsageError(f"The recipe does not use {method!r}.{registry.suggest(method, list(methods))}")
        everything = set(group) == set(methods)
        found[DENSE if everything else f"without {', '.join(group)}"] = group
    if dense:
        found[DENSE] = list(methods)
    if len(found) == 1:
        raise UsageError("Nothing to compare with: name methods with --without, or use --each or --dense.")
    return found


def _job(recipe: Recipe, overrides: Sequence[str], out: Path, label: str, left_out: Sequence[str], seed: int) -> Job:
    folder = out / label.replace(" ", "-").replace(",", "") / f"seed-{seed}"
    return Job(recipe, overrides, folder, folder / "model.ckpt", f"{label} seed {seed}", left_out, seed)


def _one(job: Job, console: Console) -> Trial:
    if job.finished:
        console.print(f"  [dim]{job.name}: done already[/]", highlight=False)
    trial = train(job, console)
    job.checkpoint.unlink(missing_ok=True)  # only needed to continue
    return trial


def _command(name: str, overrides: Sequence[str], without: Sequence[Sequence[str]], each: bool, dense: bool, seeds: int) -> str:
    groups: list[str] = [word for group in without for word in ("--without", *group)]
    flags = [*(["--each"] if each else []), *(["--dense"] if dense else []), "--seeds", str(seeds)]
    return shlex.join(["lightning-peft", "compare", name, *overrides, *groups, *flags])
