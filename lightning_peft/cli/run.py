"""`run`: a recipe beside its dense baseline, ending in a report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from lightning_peft.cli.console import Outcome, facts, grid
from lightning_peft.cli.launch import methods_in
from lightning_peft.cli.recipes import Recipe, UsageError, find_for
from lightning_peft.cli.trial import CONFIG, CURVES, Job, train
from lightning_peft.export.bake import bake_checkpoint, read_checkpoint
from lightning_peft.export.report_curves import read_curves
from lightning_peft.export.report_plots import available
from lightning_peft.export.report_proof import prove
from lightning_peft.export.report_run import RunEvidence, outcome_table, run_report
from lightning_peft.export.report_weights import weigh

DENSE, COMPOSED = "dense", "composed"


def run(
    name: str,
    overrides: Sequence[str],
    out: Path | None,
    console: Console,
    *,
    baseline: bool = True,
    resume: bool = False,
    trusted: bool = False,
) -> Outcome:
    """Train the dense baseline and the composed recipe, test both, bake, report.

    Args:
        name: Recipe name or path.
        overrides: LightningCLI arguments.
        out: Folder for everything; by default ``runs/<recipe>``, numbered when taken.
        console: Where to show progress.
        baseline: Whether to train the baseline when the recipe has one.
        resume: Whether to continue what ``out`` holds.
        trusted: Whether Python objects in its checkpoints may be rebuilt.

    Raises:
        UsageError: No such recipe, wrong overrides, a missing extra, or a folder in use.
    """
    recipe = find_for("run", name)
    methods = methods_in(recipe, overrides)
    out = claim(out, recipe, resume)
    composed = Job(recipe, overrides, out / COMPOSED, out / "model.ckpt", COMPOSED, trusted=trusted)
    jobs = [composed]
    if baseline and recipe.baseline and methods:
        dense = out / DENSE
        jobs.insert(0, replace(composed, folder=dense, checkpoint=dense / "model.ckpt", name=DENSE, without=methods))
    trials = {}
    console.print(f"[bold]{recipe.name}[/]  {recipe.summary}", highlight=False)
    for place, job in enumerate(jobs, 1):
        what = "no methods" if job.without else ", ".join(methods) or "no methods"
        console.print(
            f"[dim]{place}/{len(jobs)}[/] {job.name} ({what}){', done already' if job.finished else ''}", highlight=False
        )
        trials[job.name] = train(job, console)
    bake_checkpoint(out / "model.ckpt", out / "baked.ckpt", trusted=trusted)
    checkpoint = read_checkpoint(out / "model.ckpt", trusted=trusted)
    weights = weigh(checkpoint)
    command = ["lightning-peft", "run", name, *overrides]
    command += [*([] if baseline else ["--no-baseline"]), *(["--trusted"] if trusted else [])]
    evidence = RunEvidence(
        name=recipe.name,
        summary=recipe.summary,
        monitor=recipe.monitor,
        composed=trials[COMPOSED],
        dense=trials.get(DENSE),
        weights=weights,
        proofs=prove(checkpoint, weights.state),
        curves={job.name: read_curves(job.folder / CURVES) for job in jobs},
        command=shlex.join(command),
    )
    report = run_report(evidence)
    files = report.save(out)

    def show(console: Console) -> None:
        console.print()
        if evidence.composed.plan:
            console.print(evidence.composed.plan + "\n", highlight=False, markup=False, soft_wrap=True)
        console.print(grid(outcome_table(evidence)))
        console.print()
        console.print(facts(report.facts))
        console.print(f"\nReport [bold]{out / 'report.html'}[/], ordinary model [bold]{out / 'baked.ckpt'}[/]", soft_wrap=True)
        if not available():
            console.print('[dim]The report has no plots: pip install "lightning-peft[report]"[/]')

    made = [*files, out / "model.ckpt", out / "baked.ckpt"]
    facts_data = [asdict(fact) for fact in report.facts]
    return Outcome({**report.data, "facts": facts_data, "out": str(out), "files": [str(path) for path in made]}, show)


def claim(out: Path | None, recipe: Recipe, resume: bool) -> Path:
    """Choose the folder of a run: the one given, or the first free of ``runs/<recipe>``, ``runs/<recipe>-2``, ...

    With ``resume`` it is the one given, or the latest of those.

    Raises:
        UsageError: The folder given holds a run, or there is none to resume.
    """
    if out is not None:
        used = any((out / part / CONFIG).is_file() for part in (DENSE, COMPOSED))
        if used and not resume:
            raise UsageError(f"{out} holds a run already: add --resume to continue it, or choose another folder with --out.")
        if resume and not used:
            raise UsageError(f"There is no run in {out} to resume. Leave out --resume to start one.")
        return out
    taken: list[Path] = []
    place = folder = Path("runs") / recipe.name
    while place.exists():
        taken.append(place)
        place = folder.with_name(f"{folder.name}-{len(taken) + 1}")
    if resume and not taken:
        raise UsageError(
            f"There is no run in {folder} to resume. Leave out --resume to start one, or name its folder with --out."
        )
    return taken[-1] if resume else place
