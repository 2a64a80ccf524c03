"""`run`: a recipe beside its dense baseline, ending in a report."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from torch import Tensor

from lightning_peft.baking.bake import bake_checkpoint, read_checkpoint
from lightning_peft.cli.beside import quiet
from lightning_peft.cli.console import Outcome, facts, grid
from lightning_peft.cli.folders import CONFIG, held, try_hold
from lightning_peft.cli.interrupts import going_on
from lightning_peft.cli.job import CURVES, RESULT, Job
from lightning_peft.cli.launch import launch, methods_in, parse
from lightning_peft.cli.loading import find_loading
from lightning_peft.cli.recipes import Recipe, UsageError, find_for
from lightning_peft.cli.trial import preflight, train
from lightning_peft.report.curves import read_curves
from lightning_peft.report.plots import available
from lightning_peft.report.proof import prove
from lightning_peft.report.run import RunEvidence, outcome_table, run_report
from lightning_peft.report.weights import weigh
from lightning_peft.structure import checkpoint as sections
from lightning_peft.structure.partial import leaves_out

DENSE, COMPOSED = "dense", "composed"
# Enough for events at tenths of a training, two epochs because much goes wrong where one ends.
FEW_STEPS = (
    *("--trainer.max_epochs", "2", "--trainer.max_steps", "-1", "--trainer.limit_train_batches", "6"),
    *("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"),
    *("--trainer.val_check_interval", "1.0", "--trainer.check_val_every_n_epoch", "1"),
)


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
    command = _command(name, overrides, baseline=baseline, trusted=trusted)
    with claim(out, recipe, resume) as folder, going_on(lambda: _next(command, folder)):
        return _run(recipe, command, overrides, methods, folder, console, baseline=baseline, trusted=trusted)


def check(name: str, overrides: Sequence[str], console: Console, *, baseline: bool = True, trusted: bool = False) -> Outcome:
    """Try everything :func:`run` would do in a few steps, in a folder that is thrown away.

    Args:
        name: Recipe name or path.
        overrides: LightningCLI arguments.
        console: Where to show progress.
        baseline: Whether to try the baseline when the recipe has one.
        trusted: Whether Python objects in its checkpoints may be rebuilt.

    Raises:
        UsageError: As :func:`run`.
    """
    recipe = find_for("run", name)
    with tempfile.TemporaryDirectory(prefix="lightning-peft-") as folder:
        few = [*overrides, *FEW_STEPS, "--trainer.default_root_dir", folder]
        methods = methods_in(recipe, few)
        command = _command(name, few, baseline=baseline, trusted=trusted)
        made = _run(recipe, command, few, methods, Path(folder), console, baseline=baseline, trusted=trusted, rehearsal=True)
        refusal = _why_not_exported(name, few, Path(folder), trusted)
    loads = bool(made.data["loading"])
    steps = ["build", "train", "validate", "test", "bake", *["load"] * loads, "report", *["export"] * (not refusal)]
    notes = [*([] if loads else [made.data["loading_note"]]), *([refusal] if refusal else [])]

    def show(console: Console) -> None:
        console.print(f"\n[bold]{recipe.name}[/] can be run: {', '.join(steps)} all worked in a few steps.", highlight=False)
        for note in notes:
            console.print(note, highlight=False, markup=False, soft_wrap=True)

    return Outcome({"recipe": recipe.name, "checked": steps, "loads": loads, "notes": notes}, show)


def _why_not_exported(name: str, overrides: Sequence[str], folder: Path, trusted: bool) -> str:
    """Export what a check trained, and say why it cannot be; nothing when it can."""
    from lightning_peft.cli.export import export

    try:  # the quickest form, which ONNX files are made from, and which needs no extra
        export(folder / "model.ckpt", "exported", folder / "check.pt2", name, overrides, trusted=trusted)
    except Exception as error:  # tracing runs the network's own code, and no training depends on it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"The network is not exported: {reason[0]}"
    return ""


def _run(
    recipe: Recipe,
    command: str,
    overrides: Sequence[str],
    methods: Sequence[str],
    out: Path,
    console: Console,
    *,
    baseline: bool,
    trusted: bool,
    rehearsal: bool = False,
) -> Outcome:
    composed = Job(recipe, overrides, out / COMPOSED, out / "model.ckpt", COMPOSED, trusted=trusted, rehearsal=rehearsal)
    jobs = [composed]
    if baseline and recipe.baseline and methods:
        dense = out / DENSE
        jobs.insert(0, replace(composed, folder=dense, checkpoint=dense / "model.ckpt", name=DENSE, without=methods))
    trials = {}
    for job in jobs[1:]:  # the first is built in a moment
        preflight(job)
    console.print(f"[bold]{recipe.name}[/]  {recipe.summary}", highlight=False)
    for place, job in enumerate(jobs, 1):
        what = "no methods" if job.without else ", ".join(methods) or "no methods"
        console.print(
            f"[dim]{place}/{len(jobs)}[/] {job.name} ({what}){', done already' if job.finished else ''}", highlight=False
        )
        trials[job.name] = train(job, console)
    checkpoint = read_checkpoint(out / "model.ckpt", trusted=trusted)
    base = _base(checkpoint, recipe, overrides, methods)
    bake_checkpoint(out / "model.ckpt", out / "baked.ckpt", trusted=trusted, base=base)
    weights = weigh(checkpoint, base)
    baked = out / "baked.ckpt"
    state = read_checkpoint(baked, trusted=trusted)["state_dict"]
    loading = find_loading(parse(recipe, overrides, ()), baked, out / "model.ckpt", state, trusted=trusted)
    evidence = RunEvidence(
        name=recipe.name,
        summary=recipe.summary,
        monitor=recipe.monitor,
        composed=trials[COMPOSED],
        dense=trials.get(DENSE),
        weights=weights,
        proofs=prove(checkpoint, weights.state),
        curves={job.name: read_curves(job.folder / CURVES) for job in jobs},
        loading=loading.lines,
        loading_note=loading.text,
        command=command,
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
        console.print(f"\nReport [bold]{out / 'report.html'}[/]", soft_wrap=True)
        console.print(loading.text, highlight=False, soft_wrap=True)
        console.print("\n".join(f"    {line}" for line in loading.lines), highlight=False, markup=False, soft_wrap=True)
        if not available():
            console.print('[dim]The report has no plots: pip install "lightning-peft[report]"[/]')

    made = [*files, out / "model.ckpt", out / "baked.ckpt"]
    facts_data = [asdict(fact) for fact in report.facts]
    return Outcome({**report.data, "facts": facts_data, "out": str(out), "files": [str(path) for path in made]}, show)


def _base(
    checkpoint: Mapping[str, Any], recipe: Recipe, overrides: Sequence[str], methods: Sequence[str]
) -> dict[str, Tensor] | None:
    """Build the module anew for the tensors that a checkpoint of what was trained leaves out; ``None`` for a whole one."""
    if not leaves_out(sections.read(checkpoint)):
        return None
    module = launch(recipe, overrides, methods, quiet).model
    module.configure_model()
    return dict(module.state_dict())


def _command(name: str, overrides: Sequence[str], *, baseline: bool, trusted: bool) -> str:
    flags = [*([] if baseline else ["--no-baseline"]), *(["--trusted"] if trusted else [])]
    return shlex.join(["lightning-peft", "run", name, *overrides, *flags])


def _next(command: str, out: Path) -> str:
    """Say what continues a run that was stopped."""
    if not _started(out):
        return "Nothing was trained yet."
    return f"Continue with: {command} {shlex.join(['--out', str(out), '--resume'])}"


@contextlib.contextmanager
def claim(out: Path | None, recipe: Recipe, resume: bool) -> Iterator[Path]:
    """Hold the folder of a run: the one given, or the first free of ``runs/<recipe>``, ``runs/<recipe>-2``, ...

    With ``resume`` it is the one given, or the latest of those. A folder is free when no command works in it, and nothing
    that cost time is there.

    Raises:
        UsageError: The folder given holds a run or is in use, or there is none to resume.
    """
    if out is None:
        first = Path("runs") / recipe.name
        lock, out = _latest(first) if resume else _first_free(first)
        try:
            yield out
        finally:
            lock.release()
        return
    if _used(out) and not resume:
        raise UsageError(f"{out} holds a run already: add --resume to continue it, or choose another folder with --out.")
    if resume and not _started(out):
        raise UsageError(f"There is no run in {out} to resume. Leave out --resume to start one.")
    with held(out):
        yield out


def _first_free(first: Path) -> tuple[FileLock, Path]:
    for place in _places(first):
        if not _used(place) and (lock := try_hold(place)) is not None:
            return lock, place
    raise AssertionError("places have no end")


def _latest(first: Path) -> tuple[FileLock, Path]:
    found = [place for place in itertools.takewhile(Path.exists, _places(first)) if _started(place)]
    if not found:
        raise UsageError(
            f"There is no run in {first} to resume. Leave out --resume to start one, or name its folder with --out."
        )
    lock = try_hold(found[-1])
    if lock is None:
        raise UsageError(f"Another command is working in {found[-1]}. Wait for it, or name another folder with --out.")
    return lock, found[-1]


def _places(first: Path) -> Iterator[Path]:
    yield first
    yield from (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))


def _used(out: Path) -> bool:
    """Whether a folder has a result, or a checkpoint to continue from."""
    names = ("model.ckpt", f"{DENSE}/model.ckpt", f"{DENSE}/{RESULT}", f"{COMPOSED}/{RESULT}")
    return any((out / name).is_file() for name in names)


def _started(out: Path) -> bool:
    return _used(out) or any((out / part / CONFIG).is_file() for part in (DENSE, COMPOSED))
