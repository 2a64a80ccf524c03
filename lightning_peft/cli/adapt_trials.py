"""All episodes of an adaptation study: those in the folder are read back, the others are run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning import seed_everything
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import Subset

from lightning_peft.cli.adapt_source import Source
from lightning_peft.cli.folders import digest
from lightning_peft.cli.launch import interruptible
from lightning_peft.contract import snake_case
from lightning_peft.method import Method
from lightning_peft.report.adaptation import SOURCE, error
from lightning_peft.shifts.data import CLEAN, Part, ShiftedData, data_digest
from lightning_peft.shifts.loader import labels_in, stream_loader
from lightning_peft.shifts.record import EpisodeRecord, StreamRecorder
from lightning_peft.shifts.streams import BY_LABEL, Episode, episodes, rising_and_falling


class Trials:
    """Runs methods on streams.

    Args:
        source: The source model.
        data: Its data, with shifts.
        parts: The shifted test sets.
        methods: Methods, each run alone; the source without any comes first.
        folder: Where each finished episode is kept.
        clean: Clean samples at the end of each stream.
        console: Where to show progress.
    """

    def __init__(
        self,
        source: Source,
        data: ShiftedData,
        parts: Sequence[Part],
        methods: Sequence[Method],
        folder: Path,
        clean: int | None,
        console: Console,
    ) -> None:
        self.source, self.data, self.parts, self.methods = source, data, parts, methods
        self.folder, self.clean, self.console = folder, clean, console

    def run(self, protocols: Sequence[str], seeds: int) -> list[EpisodeRecord]:
        """Return the records of all protocols, methods and seeds.

        Raises:
            KeyboardInterrupt: The user stopped it; finished episodes stay.
        """
        self._load(protocols)
        plan = {
            (seed, protocol): episodes(protocol, self.parts, self._labels, seed=seed, clean=self.clean)
            for seed in range(seeds)  # seeds outside, so that an early look at the results is a fair one
            for protocol in protocols
        }
        rows: list[Method | None] = [None, *self.methods]
        total = len(rows) * sum(len(episode.order()) for many in plan.values() for episode in many)
        records = []
        with self._progress() as progress:
            bar = progress.add_task("", total=total)
            advance = partial(progress.advance, bar)
            for (seed, protocol), many in plan.items():
                for method in rows:
                    found = []
                    for episode in many:
                        progress.update(bar, description=f"seed {seed} {protocol} {label(method)}")
                        found.append(self._one(method, protocol, seed, episode, advance))
                    took = f"[dim]{sum(record.seconds for record in found):.1f} s[/]"
                    line = f"  seed {seed} {protocol} [bold]{label(method)}[/]  error {100 * error(found):.1f} %  {took}"
                    self.console.print(line, highlight=False)
                    records += found
        return records

    def _load(self, protocols: Sequence[str]) -> None:
        self.source.data.prepare_data()
        self.source.data.setup("test")
        needed = dict.fromkeys(self.parts)
        if "gradual" in protocols:
            needed |= dict.fromkeys(stage for part in self.parts for stage in rising_and_falling(part))
        self._template = self.data.test_dataloader()
        self._sets = {CLEAN: self._template.dataset}
        self._sets |= {part: self.data.shifted(part.shift, part.severity) for part in needed}
        self._digests = {part: data_digest(samples) for part, samples in self._sets.items()}
        labels_in(self._template, Subset(self._sets[CLEAN], range(1)))  # refuses data without labels before anything is run
        # Reading labels makes every sample of a set. Few protocols order by them; to the others a set's size is enough.
        self._labels: dict[Part, Sized] = {**self._sets}  # type: ignore[dict-item]
        if any(protocol in BY_LABEL for protocol in protocols):
            self._labels |= {part: labels_in(self._template, self._sets[part]) for part in self.parts}

    def _one(
        self, method: Method | None, protocol: str, seed: int, episode: Episode, advance: Callable[[int], None]
    ) -> EpisodeRecord:
        name = label(method)
        place = re.sub(r"[^\w.-]+", "-", episode.name)
        path = self.folder / f"{protocol}-seed-{seed}" / place / f"{name}.json"
        made_with = digest(" ".join([self.source.made_with, self.source.digest, *(self._digests[p] for p in episode.parts)]))
        if path.is_file():
            record = EpisodeRecord.read(path)
            if record.stream == episode.digest() and record.made_with == made_with:
                advance(record.samples)
                return record
        seed_everything(seed, verbose=False)
        recorder = StreamRecorder(advance)
        callbacks = [recorder, *self.source.companions, *([] if method is None else [method])]
        trainer = self.source.trainer(callbacks)
        loader = stream_loader(self._template, self._sets, episode)
        with interruptible(trainer):
            trainer.test(self.source.model, loader, verbose=False)
        record = replace(recorder.record(episode, name, protocol, seed), made_with=made_with)
        record.write(path)
        return record

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)


def label(method: Method | None) -> str:
    """The name of a method in reports: its class, or the name it was given."""
    if method is None:
        return SOURCE
    own = type(method).__name__
    return own if method.name == snake_case(own) else method.name
