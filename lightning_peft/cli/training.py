"""One training and test of a recipe in this process, which may be one of several that share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console

from lightning_peft.attaching.plan import plan
from lightning_peft.cli.beside import LastEpoch, save_last, stand_beside
from lightning_peft.cli.folders import digest
from lightning_peft.cli.job import CURVES, RESULT, Job
from lightning_peft.cli.launch import RecipeCLI, interruptible, launch
from lightning_peft.cli.progress import EpochLines, ForwardMeter, RandomState, Stopwatch
from lightning_peft.contract import methods_of, ordered
from lightning_peft.measure.change_recorder import ChangeRecorder
from lightning_peft.measure.confidence import ConfidenceRecorder, reliability_bins
from lightning_peft.measure.flop_meter import FlopMeter
from lightning_peft.report.trial import Trial
from lightning_peft.strategies.ranks import of_ranks
from lightning_peft.strategies.support import shards
from lightning_peft.weights.shards import whole


class Training:
    """A job, built and ready to be done.

    Args:
        job: The job.
        console: Where to show progress.

    Attributes:
        trainer: The Trainer.
        overruled: A sentence for each setting of the recipe that was overruled.

    Raises:
        UsageError: It cannot be built.
        MisconfigurationException: Its methods do not fit each other or the module.
    """

    def __init__(self, job: Job, console: Console) -> None:
        self._job = job
        self._stopwatch, self._meter, self._forward = Stopwatch(), FlopMeter(), ForwardMeter()
        self._confidence, self._changes = ConfidenceRecorder(), ChangeRecorder()
        self.overruled: list[str] = []
        self._cli = launch(job.recipe, job.arguments(), job.without, lambda arguments: self._adjust(arguments, console))
        self.trainer = self._cli.trainer
        self._plan = printed_plan(self._cli)

    def _adjust(self, arguments: dict[str, Any], console: Console) -> None:
        job = self._job
        lines = EpochLines(console, job.name, self._stopwatch)
        counted: list[Callback] = [self._stopwatch, self._meter, RandomState(), self._confidence, self._forward, self._changes]
        own = [*counted, lines, LastEpoch(job.checkpoint)]
        said = stand_beside(arguments, own, job.folder, CURVES, terminal=console.is_terminal, rehearsal=job.rehearsal)
        self.overruled.extend(said)

    def run(self, made_with: str) -> Trial:
        """Train, test and count; where processes share the work, all of them do.

        Args:
            made_with: What the result depends on, as :func:`lightning_peft.cli.folders.settings` has it.

        Returns:
            The result, which the first process has written into the job's folder.

        Raises:
            KeyboardInterrupt: The user stopped it; the last checkpoint is in place.
        """
        self._fit()
        with interruptible(self.trainer):
            results = self.trainer.test(self._cli.model, datamodule=self._cli.datamodule, verbose=False)
        trial = self._trial(_mean(of_ranks(results)), made_with)
        if self.trainer.is_global_zero:
            trial.write(self._job.folder / RESULT)
        return trial

    def _fit(self) -> None:
        cli, path = self._cli, self._job.checkpoint
        last = path if path.is_file() else None
        with interruptible(self.trainer):
            self.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last, weights_only=not self._job.trusted)
        if not self.trainer.strategy.broadcast(path.is_file()):  # no epoch came to its end, as with max_epochs 0
            save_last(self.trainer, path)

    def _trial(self, metrics: dict[str, float], made_with: str) -> Trial:
        self._confidence.gather()
        confidence, correct = self._confidence.confidence, self._confidence.correct
        parameters = list(self._cli.model.parameters())
        return Trial(
            name=self._job.name,
            seed=_seed_of(self._cli),
            methods=[
                {"method": type(method).__name__, "name": method.name, "config": method.config()}
                for method in ordered(methods_of(self.trainer.callbacks))  # type: ignore[attr-defined]
            ],
            plan=self._plan,
            metrics=metrics,
            seconds=self._stopwatch.total(),
            flops=float(self._meter.total),
            epochs=self.trainer.current_epoch,
            steps=self.trainer.global_step,
            parameters=sum(parameter.numel() for parameter in parameters),
            nonzero=sum(int(whole(parameter.detach()).count_nonzero()) for parameter in parameters),
            calibration=reliability_bins(confidence, correct) if confidence else [],
            calibration_errors={name: list(pair) for name, pair in self._confidence.table().items()},
            forward_flops=self._forward.flops,
            learnt=self._changes.learnt.as_data(),
            notes=self.overruled,
            made_with=digest(made_with),
        )


def _mean(ranks: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Take the mean over processes of what each logged in its tests; what was logged for all of them is the same in each."""
    each = [{name: float(value) for result in results for name, value in result.items()} for results in ranks]
    return {name: sum(found[name] for found in each) / len(each) for name in each[0]}


def _seed_of(cli: RecipeCLI) -> int | None:
    """Return the seed a recipe was built with; ``None`` where it asked for none."""
    seed = cli.config.seed_everything
    return None if seed is False or seed is None else int(seed)


def printed_plan(cli: RecipeCLI) -> str:
    """Return the plan of a recipe's methods; nothing where it has none, or where its network is not complete before a run.

    Raises:
        MisconfigurationException: They do not fit each other or the module.
    """
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    if not list(methods_of(callbacks)):
        return ""
    try:
        return str(plan(cli.model, callbacks))
    except MisconfigurationException:
        if _made_later(cli):
            return ""
        raise


def _made_later(cli: RecipeCLI) -> bool:
    """Whether ``configure_model`` makes the network or a part of it; Lightning calls that more than once as well."""
    if not is_overridden("configure_model", cli.model):
        return False
    before = {name for name, _ in cli.model.named_parameters()}
    if shards(cli.trainer.strategy):  # what __init__ made is all that methods are attached to
        return not before
    with suppress(Exception):
        cli.model.configure_model()
        return {name for name, _ in cli.model.named_parameters()} != before
    return True
