"""`adapt`: test-time methods of a recipe, each alone, under distribution shift."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lightning_peft.cli.adapt_source import Source
from lightning_peft.cli.adapt_trials import Trials
from lightning_peft.cli.console import Outcome, facts, grid
from lightning_peft.cli.file_commands import existing
from lightning_peft.cli.folders import check_writable, held
from lightning_peft.cli.interrupts import AGAIN, going_on
from lightning_peft.cli.recipes import UsageError, check_seeds, find
from lightning_peft.report.adaptation import Study, adaptation_report, cost_table, method_table, part_table
from lightning_peft.shifts.data import ShiftedData, choose_parts
from lightning_peft.shifts.streams import PROTOCOLS, check_protocol


@dataclass(frozen=True)
class Choice:
    """The scope of a study.

    Attributes:
        methods: Methods of the recipe to run, by class name or name; all when empty.
        shifts: Shifts to run under; all when empty.
        severities: Severities of the shifts that have any; the highest when empty.
        protocols: Protocols.
        seeds: Seeds 0 to ``seeds - 1``.
        clean: Clean samples at the end of every stream; ``None`` for all.
    """

    methods: Sequence[str] = ()
    shifts: Sequence[str] = ()
    severities: Sequence[int] = ()
    protocols: Sequence[str] = ("continual",)
    seeds: int = 3
    clean: int | None = None

    def flags(self) -> list[str]:
        """The choice as command line arguments."""
        words: list[str] = []
        for flag in ("methods", "shifts", "severities", "protocols"):
            values = getattr(self, flag)
            words += [f"--{flag}", *map(str, values)] if values else []
        return [*words, "--seeds", str(self.seeds), *([] if self.clean is None else ["--clean", str(self.clean)])]


def adapt(
    name: str,
    overrides: Sequence[str],
    choice: Choice,
    console: Console,
    *,
    out: Path | None,
    checkpoint: Path | None,
    trusted: bool = False,
) -> Outcome:
    """Get the source model, then run every method on every stream; what is finished in the folder is not repeated.

    Args:
        name: Recipe name or path.
        overrides: LightningCLI arguments.
        choice: What to run.
        console: Where to show progress.
        out: Folder for everything; by default ``runs/adapt/<recipe>``.
        checkpoint: Take the source from this checkpoint instead of training it.
        trusted: Whether Python objects in checkpoints may be rebuilt.

    Raises:
        UsageError: No such recipe or method, data without shifts, or a folder used with other settings.
        MisconfigurationException: No such shift, severity or protocol.
    """
    check_seeds(choice.seeds)
    for protocol in choice.protocols:
        check_protocol(protocol)
    if checkpoint is not None:
        existing(checkpoint)
    recipe = find(name)
    out = out or Path("runs") / "adapt" / recipe.name
    check_writable(out, "--out")
    console.print(f"[bold]{recipe.name}[/]  {recipe.summary}", highlight=False)
    source = Source(recipe, overrides, trusted)
    chosen = source.choose(choice.methods)
    data = source.data
    if not (isinstance(data, ShiftedData) and callable(data.shifts)):
        raise UsageError(
            f"{type(data).__name__} has no shifts to adapt to. Give it shifts() and shifted(shift, severity), as "
            "lightning_peft.shifts.ShiftedData describes; docs/shifts.md has an example."
        )
    parts = choose_parts(data.shifts(), choice.shifts, choice.severities)
    size = f"{len(chosen)} methods and the source, {len(parts)} shifts, {', '.join(choice.protocols)}, {choice.seeds} seeds"
    console.print(f"[dim]{size}[/]", highlight=False)
    with held(out), going_on(lambda: AGAIN):
        note = source.obtain(out, checkpoint, console)
        trials = Trials(source, data, parts, chosen, out / "episodes", choice.clean, console)
        records = trials.run(choice.protocols, choice.seeds)
    command = shlex.join(
        [
            "lightning-peft",
            "adapt",
            name,
            *choice.flags(),
            *(["--checkpoint", str(checkpoint)] if checkpoint else []),
            *(["--trusted"] if trusted else []),
            *overrides,
        ]
    )
    notes = (note, getattr(data, "shift_note", ""))
    study = Study(recipe.name, records, command, tuple(note for note in notes if note))
    report = adaptation_report(study)
    files = report.save(out)

    def show(console: Console) -> None:
        for protocol in study.protocols():
            console.print(f"\n[bold]{protocol}[/]  [dim]{PROTOCOLS[protocol]}[/]", highlight=False)
            console.print(grid(method_table(study, protocol)))
            console.print()
            console.print(grid(cost_table(study, protocol)))
            if len(parts) <= 6:
                console.print()
                console.print(grid(part_table(study, protocol)))
        console.print()
        console.print(facts(report.facts))
        console.print(f"\nReport [bold]{out / 'report.html'}[/]", soft_wrap=True)

    return Outcome({**report.data, "out": str(out), "files": [str(path) for path in files]}, show)
