"""What every method does beside every feature of a Trainer, checked against the same training without the method."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pairs import CONFIGURATIONS
from torch import Tensor
from trainer_features import BY_NAME, factors, subject_class
from verdicts import BREAKS, WORKS, Verdict, WrongError, verdict

import lightning_peft as peft
from lightning_peft import Lane, Method
from lightning_peft.testing.trace import difference, trace, without

_QUIET = ("logger", "enable_progress_bar", "enable_model_summary")


@dataclass
class Run:
    """A finished training.

    Attributes:
        module: What it left behind.
        steps: Steps that it made.
        metrics: Names of what was logged.
        said: Warnings.
    """

    module: Any
    steps: int
    metrics: set[str]
    said: list[str]


def combined(names: Iterable[str]) -> dict[str, str]:
    """One feature of each factor: those named, and the defaults."""
    chosen = {factor: values[0] for factor, values in factors().items()}
    return chosen | {BY_NAME[name].factor: name for name in names}


def train(row: Sequence[str], make: Any = None, *, tested: bool) -> Run:
    """Train with features of each factor.

    Args:
        row: Names of features.
        make: Makes the method, if there shall be one.
        tested: Whether a test follows, in which a method that adapts acts.
    """
    chosen = [BY_NAME[name] for name in combined(row).values()]
    by_factor = {feature.factor: feature.name for feature in chosen}
    pl = importlib.import_module(by_factor["namespace"])
    for part in ("callbacks", "loggers", "profilers", "plugins.precision"):
        importlib.import_module(f"{by_factor['namespace']}.{part}")
    ways = {key: value for feature in chosen for key, value in feature.subject.items()}
    torch.manual_seed(0)
    module = subject_class(by_factor["namespace"])(**ways)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            runner, metrics = _run(pl, chosen, by_factor["afterwards"], module, make, Path(folder), tested=tested)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_default_dtype(torch.float32)
    return Run(module, runner.global_step, metrics, [str(each.message) for each in said])


def _trainer(pl: Any, chosen: Sequence[Any], methods: Sequence[Method], folder: Path, **more: Any) -> Any:
    settings: dict[str, Any] = {}
    callbacks: list[Any] = []
    for feature in sorted(chosen, key=lambda feature: feature.factor != "callback"):  # what callbacks need, others may change
        settings |= feature.settings(pl, folder)
        callbacks += feature.callbacks(pl, folder)
    saves = any("Checkpoint" in type(callback).__name__ for callback in callbacks)
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "num_sanity_val_steps": 0}
    if settings.get("barebones"):
        for key in ("num_sanity_val_steps", *_QUIET):
            defaults.pop(key, None)
        if settings.get("num_sanity_val_steps") == 2:
            settings.pop("num_sanity_val_steps")
    else:
        defaults |= {**dict.fromkeys(_QUIET, False), "enable_checkpointing": saves}
    return pl.Trainer(**{**defaults, **settings, **more, "callbacks": [*callbacks, *methods]})


def _run(
    pl: Any, chosen: Sequence[Any], afterwards: str, module: Any, make: Any, folder: Path, *, tested: bool
) -> tuple[Any, set[str]]:
    methods = [make()] if make else []
    runner = _trainer(pl, chosen, methods, folder)
    runner.fit(module)
    metrics = set(runner.callback_metrics)
    if tested:
        tester = _trainer(pl, chosen, methods, folder)
        tester.test(module, verbose=False)
    if afterwards in ("validate", "test"):
        getattr(runner, afterwards)(module, verbose=False)
    elif afterwards == "predict":
        runner.predict(module)
    elif afterwards in ("resume", "load_from_checkpoint"):
        _from_file(pl, chosen, afterwards, module, make, folder, runner)
    elif afterwards == "fit again":
        _trainer(pl, chosen, [make()] if make else [], folder).fit(module)
    return runner, metrics


def _from_file(pl: Any, chosen: Sequence[Any], how: str, module: Any, make: Any, folder: Path, runner: Any) -> None:
    path = folder / "saved.ckpt"
    runner.save_checkpoint(path)
    fresh = type(module)(**module.ways)
    if how == "resume":
        again = _trainer(pl, chosen, [make()] if make else [], folder, max_epochs=3, max_steps=-1)
        again.fit(fresh, ckpt_path=path, weights_only=False)
    elif not make:
        fresh.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    else:
        loaded = peft.load_from_checkpoint(type(module), path, **module.ways)
        fresh_types = {name: value.dtype for name, value in loaded.state_dict().items()}  # as the class builds it
        trained = {name: value.to(fresh_types.get(name)) for name, value in module.state_dict().items()}
        if (found := difference(trained, dict(loaded.state_dict()))) is not None:
            raise WrongError(f"load_from_checkpoint: {found}")


@cache
def plain(row: tuple[str, ...], *, tested: bool = False) -> Run | Exception:
    """The training without a method, or what Lightning says to it."""
    try:
        return train(row, tested=tested)
    except (Exception, SystemExit) as error:
        return RuntimeError(f"{type(error).__name__}: {error}")


def outcome(row: Sequence[str], method: str) -> Verdict:
    """Train with features and a method, and compare with the training without the method."""
    tested = CONFIGURATIONS[method]().lane == Lane.ADAPT
    expected = plain(tuple(row), tested=tested)
    if isinstance(expected, Exception):
        return Verdict("", str(expected))
    # A step is too short for most methods, and the average of so short a training is of weights from before its second epoch.
    trial = bool({"fast_dev_run", "StochasticWeightAveraging"} & set(row))
    return verdict(lambda: _compared(train(row, CONFIGURATIONS[method], tested=tested), expected, method, trial=trial))


def _compared(run: Run, expected: Run, method: str, *, trial: bool) -> str:
    """Raise what a training did wrong.

    Args:
        run: The training.
        expected: The training without the method.
        method: Its name.
        trial: Whether nothing is expected of so short a training.

    Raises:
        WrongError: Something was left on the module, lost, or not done without a word.
    """
    lane = CONFIGURATIONS[method]().lane
    state = run.module.state_dict()
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken and not _broken(expected):
        raise WrongError(f"not finite: {', '.join(broken[:3])}")
    clean, now = trace(expected.module), trace(run.module)
    parts = {"classes": clean["classes"].keys() & now["classes"].keys()}
    if (found := difference(without(clean, parts), without(now, parts))) is not None:
        raise WrongError(f"plain Lightning against this: {found}")
    if mapped := [name for name in state if "parametrizations" in name]:
        raise WrongError(f"weight maps were left on {mapped[0]}")
    # A learning rate is logged by its group once there is more than one.
    if lost := {name for name in expected.metrics - run.metrics if f"{name}/pg1" not in run.metrics}:
        raise WrongError(f"no longer logged: {', '.join(sorted(lost))}")
    if run.steps != expected.steps:
        raise WrongError(f"{run.steps} steps, plain Lightning makes {expected.steps}")
    same = difference(_weights(expected), _weights(run)) is None
    told = [words for words in run.said if words not in expected.said]
    if same and lane not in (Lane.ADAPT, Lane.REPORT) and not told and not trial:
        raise WrongError("the weights are those of a training without the method, and nothing is said")
    return told[0] if same and told else ""


def _broken(run: Run) -> bool:
    return any(not value.isfinite().all() for value in run.module.state_dict().values() if value.is_floating_point())


def _weights(run: Run) -> dict[str, Tensor]:
    return {name: value.float() for name, value in run.module.network.state_dict().items()}


def smallest(row: Sequence[str], method: str) -> tuple[Sequence[str], Verdict]:
    """The fewest features of a combination beside which a method does the same that is not working, and what it does."""
    defaults = set(combined(()).values())
    rest = [name for name in row if name not in defaults]
    found = outcome(rest, method)
    for name in list(rest):
        fewer = [other for other in rest if other != name]
        now = outcome(fewer, method)
        if now.what == found.what and now.what in (BREAKS, found.what) and now.what != WORKS:
            rest, found = fewer, now
    return rest, found
