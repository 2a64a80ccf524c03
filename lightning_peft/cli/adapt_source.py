"""The source model of an adaptation study: trained by the recipe, used as it is built, or read from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from lightning_peft import registry
from lightning_peft.baking.bake import baked, read_checkpoint
from lightning_peft.cli.beside import quiet, save_last
from lightning_peft.cli.file_commands import existing
from lightning_peft.cli.folders import check_settings, file_digest, settings
from lightning_peft.cli.job import Job
from lightning_peft.cli.launch import interruptible, launch, methods_in, parse, quiet_lightning
from lightning_peft.cli.loading import find_loading
from lightning_peft.cli.recipes import Recipe, UsageError
from lightning_peft.cli.trial import train
from lightning_peft.compose.lanes import Lane
from lightning_peft.method import Method
from lightning_peft.report.trial import show
from lightning_peft.shifts.data import content_digest

CHECKPOINT = "source.ckpt"


class Source:
    """A recipe's objects: the module, its data, and the methods that adapt; :meth:`obtain` gives it the source's weights.

    Args:
        recipe: The recipe.
        overrides: LightningCLI arguments.
        trusted: Whether Python objects in checkpoints may be rebuilt.

    Attributes:
        made_with: Settings of the study, once :meth:`obtain` was called.
        digest: Digest of the source's tensors and of the companions' states, likewise.
        methods: Methods that adapt.
        companions: Other methods that evaluations need, such as estimators with what they learnt.

    Raises:
        UsageError: The recipe cannot be used as given, or has no method that adapts.
    """

    def __init__(self, recipe: Recipe, overrides: Sequence[str], trusted: bool = False) -> None:
        self._recipe, self._overrides, self._trusted = recipe, overrides, trusted
        self.made_with = self.digest = ""
        self._adapting = [name for name in methods_in(recipe, overrides) if registry.find(name).lane == Lane.ADAPT]
        if not self._adapting:
            raise UsageError(
                f"The recipe {recipe.name} has no method that adapts at test time. List those to compare under "
                "trainer.callbacks, such as lightning_peft.Tent; each is run alone."
            )
        quiet_lightning()
        methods: list[Method] = []

        def keep(arguments: dict[str, Any]) -> None:  # no Trainer takes several methods that adapt
            methods.extend(_methods(arguments["callbacks"]))
            arguments["callbacks"] = []
            quiet(arguments)

        self._cli = launch(recipe, overrides, adjust=keep)
        if (processes := self._cli.trainer.world_size) > 1:
            raise UsageError(
                f"The recipe {recipe.name} asks for {processes} processes, and adapt works in one: add --trainer.devices 1."
            )
        self.methods = _distinct([method for method in methods if method.lane == Lane.ADAPT])
        self.companions = [method for method in methods if method.lane == Lane.REPORT]

    @property
    def model(self) -> LightningModule:
        """The module."""
        return self._cli.model

    @property
    def data(self) -> Any:
        """The data module."""
        return self._cli.datamodule

    def trainer(self, callbacks: Sequence[Callback]) -> Trainer:
        """A Trainer with the recipe's settings and these callbacks."""

        def adjust(arguments: dict[str, Any]) -> None:
            quiet(arguments)
            arguments["callbacks"] = list(callbacks)

        self._cli.adjust = adjust
        return self._cli.instantiate_trainer()

    def choose(self, names: Sequence[str]) -> list[Method]:
        """Methods by class name or name; all without names.

        Raises:
            UsageError: The recipe has no such method.
        """
        known = {key: method for method in self.methods for key in (type(method).__name__, method.name)}
        for name in names:
            if name not in known:
                raise UsageError(f"The recipe has no method {name!r} that adapts.{registry.suggest(name, list(known))}")
        return [known[name] for name in names] if names else list(self.methods)

    def obtain(self, out: Path, checkpoint: Path | None, console: Console) -> str:
        """Train or take the source once, keep it in ``out``, and load it; return where its weights come from.

        Raises:
            UsageError: ``out`` holds a study with other settings or another source, or there is no such checkpoint.
            CheckpointError: The checkpoint cannot be read.
        """
        path = out / CHECKPOINT
        parsed = parse(self._recipe, self._overrides)
        trained = checkpoint is None and parsed.config.trainer.max_epochs != 0
        origin = "trained by the recipe" if trained else "as the recipe builds it"
        if checkpoint is not None:
            origin = f"a checkpoint with sha256 {file_digest(existing(checkpoint))}"
        job = Job(self._recipe, self._overrides, out / "source", path, "source", self._adapting, trusted=self._trusted)
        self.made_with = settings(parsed, [f"source model: {origin}"])
        check_settings(out, self.made_with, kept=job.kept)
        if trained:
            console.print("[dim]source model[/]", highlight=False)
            trial = train(job, console)
            note = f"Source: trained by this recipe, {trial.seed_text}, {trial.epochs} epochs."
            monitor = self._recipe.monitor
            if monitor in trial.metrics:
                note += f" {monitor}: {show(monitor, trial.metrics[monitor])} on the clean test set."
        else:
            note = f"Source: {checkpoint}." if checkpoint else "Source: the model as the recipe builds it, not trained further."
            if not path.is_file():
                self._take(checkpoint, path)
        self._load(path, self.model, self.companions)
        self.digest = content_digest([self.model.state_dict(), [method.state_dict() for method in self.companions]])
        loading = find_loading(parsed, path, path, self.model.state_dict(), trusted=self._trusted)
        lines = f" `{'; '.join(loading.lines)}`" if loading.lines else ""
        return f"{note} {loading.text}{lines}"

    def _take(self, checkpoint: Path | None, path: Path) -> None:
        """Validate an untrained source, in which estimators see clean data, and save it."""
        cli = launch(self._recipe, self._overrides, self._adapting, quiet)
        if checkpoint is not None:
            self._load(checkpoint, cli.model, _methods(cli.trainer.callbacks))  # type: ignore[attr-defined]
        with interruptible(cli.trainer):
            cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        save_last(cli.trainer, path)

    def _load(self, path: Path, model: LightningModule, methods: Iterable[Method]) -> None:
        """Give a module the ordinary weights in a checkpoint, and methods what they had saved in it."""
        found = read_checkpoint(path, trusted=self._trusted)
        model.load_state_dict(baked(found)["state_dict"])
        for method in methods:
            if method.state_key in found.get("callbacks", {}):
                method.load_state_dict(found["callbacks"][method.state_key])


def _distinct(methods: Sequence[Method]) -> list[Method]:
    taken: set[str] = set()
    for method in methods:
        if method.name in taken:
            raise UsageError(
                f"Two methods of the recipe are called {method.name!r}. Give one a name of its own: init_args: {{name: ...}}."
            )
        taken.add(method.name)
    return list(methods)


def _methods(callbacks: Iterable[object]) -> list[Method]:
    return [callback for callback in callbacks if isinstance(callback, Method)]
