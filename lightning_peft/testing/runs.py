"""One short training, as the checks of :class:`~lightning_peft.testing.tester.MethodTester` need it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.method import Method
from lightning_peft.structure.checkpoint import KEY
from lightning_peft.testing.callbacks import Losses
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.trace import difference, trace, without

_EXPECTED = (
    "You're resuming from a checkpoint that ended before the epoch ended",
    "The dirpath has changed from",
    "Be aware that when using `ckpt_path`, callbacks used to create",
    "Checkpoint directory .* exists and is not empty",
    "Using ModelCheckpoint with manual optimization and every_n_train_steps",
    ".*: this fit ended after",
    ".*without the part 'toy_gate'",
)


@dataclass
class Fit:
    """A finished training: what ran, and what it left behind."""

    trainer: Trainer
    module: LightningModule
    methods: list[Method]
    losses: list[float] = field(default_factory=list)

    _state: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Everything that decides how training would go on: weights, optimizers, schedulers, methods; looked at once."""
        if self._state is None:
            with TemporaryDirectory() as folder:
                path = Path(folder, "now.ckpt")
                self.trainer.save_checkpoint(path)
                self._state = resumable(torch.load(path, weights_only=True))
        return self._state


def seed_all(seed: int) -> None:
    """Seed every generator a method may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)


def fit(
    methods: Iterable[Method],
    *,
    style: type[Plain] = Plain,
    seed: int = 0,
    optimizer: str = "adam",
    before: Sequence[Callback] = (),
    after: Sequence[Callback] = (),
    data: Any = None,
    resume: str | Path | None = None,
    module: LightningModule | None = None,
    expected: Sequence[str] = _EXPECTED,
    **overrides: Any,
) -> Fit:
    """Train a tiny module with methods.

    Args:
        methods: The methods.
        style: Class of the module.
        seed: Seed set before the module is built.
        optimizer: ``"adam"`` or ``"sgd"``.
        before: Callbacks listed before the methods.
        after: Callbacks listed after the methods.
        data: Training loader; a small one by default.
        resume: Checkpoint to resume from, read with ``weights_only=True``.
        module: Train this one instead of a new one.
        expected: Warnings that do not matter, as patterns.
        **overrides: Passed to ``Trainer``.
    """
    seed_all(seed)
    methods = list(methods)
    module = style(optimizer) if module is None else module
    losses: list[float] = []
    callbacks = [*before, *methods, *after, Losses(losses)]
    runner = trainer(callbacks=callbacks, **overrides)
    with warnings.catch_warnings():
        # Resuming an interrupted epoch, without the ModelCheckpoint or in another folder, is what these runs are for.
        for message in expected:
            warnings.filterwarnings("ignore", message=message)
        runner.fit(
            module, loader() if data is None else data, loader(8), ckpt_path=resume, weights_only=True if resume else None
        )
    return Fit(runner, module, methods, losses)


def resumable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The parts of a checkpoint that must agree for two trainings to go on in the same way."""
    kept = {key: checkpoint[key] for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers")}
    methods = {key: state for key, state in checkpoint["callbacks"].items() if key.startswith(f"{KEY}/")}
    return {**kept, "callbacks": dict(sorted(methods.items())), KEY: checkpoint.get(KEY)}


def assert_same(a: Fit, b: Fit, what: str) -> None:
    """Fail, naming the first thing that differs, unless two trainings ended in the same state, bit for bit.

    Raises:
        AssertionError: They differ.
    """
    found = difference(a.state(), b.state()) or difference(dict(a.module.state_dict()), dict(b.module.state_dict()))
    assert found is None, f"{what}: not the same, bit for bit. First difference: {found}"


_CLEAN: dict[type[LightningModule], dict[str, Any]] = {}


def _clean_trace(style: type[LightningModule]) -> dict[str, Any]:
    """A module of this style after training by plain Lightning."""
    if style not in _CLEAN:
        _CLEAN[style] = trace(fit([], style=style).module)  # type: ignore[arg-type]
    return _CLEAN[style]


def assert_clean(module: LightningModule, after: str, *, fewer: bool = False) -> None:
    """Fail unless a module looks as plain Lightning would have left it.

    Args:
        module: The module.
        after: What it went through, for the message.
        fewer: Whether it may have lost some of its parts.

    Raises:
        AssertionError: Something was left on it.
    """
    clean, now = _clean_trace(type(module)), trace(module)
    found = difference(without(clean, now) if fewer else clean, now)
    assert found is None, f"{type(module).__name__} after {after}, plain Lightning against this: {found}"
