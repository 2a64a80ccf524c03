"""Running many trials, each group of them in a process of its own, so that a hang or a crash is an outcome too; resumable."""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from verdicts import BREAKS, SIGNS, Verdict

_TICK = 0.5  # seconds
_KINDS = {sign: what for what, sign in SIGNS.items()}


@dataclass
class Record:
    """Outcomes by group and cell, as a file keeps them: a line a group, messages once each.

    Attributes:
        path: The file.
        versions: What the outcomes hold for.
        found: The outcomes.
        unbuilt: Groups that could not be tried, with the reason.
    """

    path: Path
    versions: dict[str, str] = field(default_factory=dict)
    found: dict[str, dict[str, Verdict]] = field(default_factory=dict)
    unbuilt: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read the file; an empty record when there is none."""
        if not path.exists():
            return cls(path)
        stored = json.loads(path.read_text())
        words = stored["words"]

        def verdict(cell: str) -> Verdict:
            return Verdict(_KINDS[cell[0]], words[int(cell[1:])] if len(cell) > 1 else "")

        found = {group: {name: verdict(cell) for name, cell in cells.items()} for group, cells in stored["outcomes"].items()}
        return cls(path, stored["versions"], found, stored["unbuilt"])

    def write(self) -> None:
        """Write the file, whole or not at all."""
        words = sorted({each.words for cells in self.found.values() for each in cells.values() if each.words})
        place = {text: number for number, text in enumerate(words)}

        def cell(each: Verdict) -> str:
            return SIGNS[each.what] + (str(place[each.words]) if each.words else "")

        lines = [
            f"  {json.dumps(group)}: {json.dumps({name: cell(each) for name, each in cells.items()})}"
            for group, cells in sorted(self.found.items())
        ]
        texts = [f"  {json.dumps(text)}" for text in words]
        part = self.path.with_suffix(".part")
        part.write_text(
            f'{{"versions": {json.dumps(self.versions)},\n "unbuilt": {json.dumps(self.unbuilt, indent=1)},\n'
            ' "outcomes": {\n' + ",\n".join(lines) + '\n},\n "words": [\n' + ",\n".join(texts) + "\n]}\n"
        )
        part.replace(self.path)

    @property
    def outcomes(self) -> list[Verdict]:
        """All of them."""
        return [each for cells in self.found.values() for each in cells.values()]

    def of(self, what: str) -> list[tuple[str, str, str]]:
        """Group, cell and message of the outcomes of a kind."""
        cells = ((group, name, each) for group, cells in self.found.items() for name, each in cells.items())
        return [(group, name, each.words) for group, name, each in cells if each.what == what]


Trial = Callable[[str, str], Verdict]


def sweep(
    record: Record,
    cells: Mapping[str, Sequence[str]],
    trial: Trial,
    *,
    limit: int,
    patience: float = 3600.0,
    length: int = 240,
) -> None:
    """Run the trials that are not on record, and write the record after each group.

    Args:
        record: The record.
        cells: The trials by group.
        trial: Runs one, in a process that was forked for its group; a verdict that says nothing but words means that the
            group cannot be tried.
        limit: Seconds of a processor that one may take; a busy machine is no fault of a trial.
        patience: Seconds until one that takes no processor's time counts as hanging.
        length: Characters of a message that are kept.
    """
    missing = {group: [name for name in names if name not in record.found.get(group, {})] for group, names in cells.items()}
    missing = {group: names for group, names in missing.items() if names}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=sum(map(len, missing.values())))
        for group, names in missing.items():
            progress.update(task, description=group)
            for name, found in _in_processes(group, names, trial, limit, patience):
                progress.update(task, advance=1)
                words = found.words.strip().split("\n")[0][:length]
                if not found.what:
                    record.unbuilt[group] = words
                    break
                record.found.setdefault(group, {})[name] = Verdict(found.what, words)
            if group in record.found:
                record.found[group] = {name: record.found[group][name] for name in cells[group] if name in record.found[group]}
            record.write()


def _in_processes(group: str, names: Iterable[str], trial: Trial, limit: int, patience: float) -> Iterator[tuple[str, Verdict]]:
    """Run a group's trials in one process, and go on in another after one that did not come back."""
    rest = list(names)
    while rest:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(there, group, list(rest), trial, limit))
        process.start()
        there.close()
        try:
            lives = True
            while rest and lives:
                found, lives = _wait(here, process, limit, patience)
                yield rest.pop(0), found
        finally:
            here.close()
            process.kill()  # also where nobody wants the rest
            process.join()


def _wait(pipe: Any, process: Any, limit: int, patience: float) -> tuple[Verdict, bool]:
    """Wait for a trial; the second entry says whether its process goes on."""
    waited = 0.0  # counted in ticks, so that a machine that was halted meanwhile is not taken for a trial that hangs
    while not pipe.poll(_TICK):
        waited += _TICK
        if waited >= patience:
            return Verdict(BREAKS, f"did not end within {patience:g} seconds"), False
    try:
        return Verdict(*pipe.recv()), True
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return Verdict(BREAKS, f"took more than {limit} seconds of a processor"), False
        return Verdict(BREAKS, f"ended its process with code {process.exitcode}"), False


def _work(pipe: Any, group: str, names: Sequence[str], trial: Trial, limit: int) -> None:
    torch.set_num_threads(1)
    for name in names:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + limit, hard))
        found = trial(group, name)
        pipe.send((found.what, found.words))
