"""What every method that trains does in lower precision.

    python tests/pairs/precisions.py [METHOD ...]

prints a line for every method and precision. Each is trained on the small network of the pairs and held against the same
training in single precision, resumed from its second epoch, and met by steps that a gradient scaler skips.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from pairs import CONFIGURATIONS, Classifier, batches, data
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from verdicts import SIGNS, Verdict, WrongError, verdict

from lightning_peft import Lane, Method, NMSparsity
from lightning_peft.baking.nm_proof import prove_nm
from lightning_peft.testing.modules import trainer
from lightning_peft.testing.runs import resumable
from lightning_peft.testing.trace import difference

PRECISIONS = ("bf16-true", "bf16-mixed", "16-mixed")
SCALE, OVERFLOW = 2.0**10, 2.0**120
EPOCHS, AMID = 3, 4  # of two batches each, and the step that a resumed training goes on from
NEAR = 0.1  # share of a loss
AGAIN = (0, 3)  # batches that the scaler skips and that come once more
STEPS = 5
PATTERN = (2, 4)
BY_SAMPLE = {"probabilities", "seen"}

CASES: dict[str, Callable[[], Method]] = {
    **{name: make for name, make in CONFIGURATIONS.items() if make().lane != Lane.ADAPT},
    **{
        f"NMSparsity {recipe}": partial(NMSparsity, "2:4", recipe, targets="all-weights")
        for recipe in ("one-shot", "ste", "sr-ste", "mdgf-linear", "sdgf-stepwise")
    },
    "NMSparsity held": lambda: NMSparsity("2:4", "sr-ste", targets="all-weights", refresh=2),
    "NMSparsity transposable": lambda: NMSparsity("2:4", targets="all-weights", transposable=True),
}


class Tuned(Classifier):
    """Has an optimizer with a state, and statistics that no step moves which is taken back."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.5)


class Losses(Callback):
    """Keeps what was optimised."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.found.append(float(outputs["loss"]))


class Scale(Callback):
    """Sets the factor of the scaler before every batch: one that overflows before some.

    Args:
        overflows: Those batches.
        steps: Real steps after which the training ends.
    """

    def __init__(self, overflows: Sequence[int], steps: int) -> None:
        self.overflows, self.steps = overflows, steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        scaler = trainer.precision_plugin.scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": OVERFLOW if batch_idx in self.overflows else SCALE})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        methods = [callback for callback in trainer.callbacks if isinstance(callback, Method)]
        if methods[0].steps == self.steps:
            trainer.should_stop = True


@dataclass
class Fit:
    """A finished training: all that decides how it would go on, the weights it left, and its losses."""

    state: dict[str, Any]
    weights: dict[str, Tensor]
    losses: list[float]
    module: Tuned
    kind: type[Method]


def settings(precision: str, device: str) -> dict[str, Any]:
    """Arguments of a Trainer; half precision has a gradient scaler, on the CPU too."""
    where = {"accelerator": device, "deterministic": "warn" if device == "cuda" else None}
    if precision != "16-mixed":
        return {**where, "precision": precision}
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=2)
    return {**where, "plugins": [MixedPrecision("16-mixed", device, scaler)]}


def fit(
    make: Callable[[], Method],
    precision: str,
    device: str,
    order: Sequence[int] = range(8),
    callbacks: Sequence[Callback] = (),
    resume: Path | None = None,
    epochs: int = EPOCHS,
) -> Fit:
    """Train.

    Args:
        make: Makes the method.
        precision: One of Lightning's.
        device: Where.
        order: Samples of an epoch, in batches of four.
        callbacks: More callbacks.
        resume: Checkpoint to go on from.
        epochs: How many.
    """
    torch.manual_seed(0)
    module, losses = Tuned(), Losses()
    methods = [make()]
    runner = trainer(callbacks=[*methods, losses, *callbacks], max_epochs=epochs, **settings(precision, device))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(Subset(data(), [*order]), batch_size=4)
        runner.fit(module, loader, batches(1), ckpt_path=resume, weights_only=True if resume else None)
        path = Path(folder, "now.ckpt")
        runner.save_checkpoint(path)
        stored = torch.load(path, weights_only=True)
    state = {**resumable(stored), "scaler": stored.get("MixedPrecision")}
    return Fit(
        state, {name: value.clone() for name, value in module.state_dict().items()}, losses.found, module, type(methods[0])
    )


@cache
def single(name: str, device: str) -> Fit:
    """A training in single precision."""
    return fit(CASES[name], "32-true", device)


def outcome(name: str, precision: str, device: str = "cpu") -> Verdict:
    """What a method does in a precision: it works, is rejected in words, or what is wrong."""
    return verdict(lambda: check(name, precision, device))


def check(name: str, precision: str, device: str) -> str:
    """Try a method.

    Returns:
        How far the losses are from those in single precision.

    Raises:
        WrongError: The training is not finite, far from that in single precision, of another type or with other zeros, does
            not go on as it would have, or a skipped step moved something.
    """
    with tempfile.TemporaryDirectory() as folder:
        saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=AMID, save_top_k=-1)
        done = fit(CASES[name], precision, device, callbacks=[saves])
        off = check_numbers(precision, done, single(name, device))
        again = fit(CASES[name], precision, device, resume=Path(folder, f"step={AMID}.ckpt"))
    if (found := difference(done.state, again.state) or difference(done.weights, again.weights)) is not None:
        raise WrongError(f"resumed from step {AMID}: {found}")
    if precision == "16-mixed":
        check_skipped(name, device)
    return f"losses within {off:.1%}"


def check_numbers(precision: str, done: Fit, exact: Fit) -> float:
    """Hold a training against that in single precision."""
    floats = {key: value for key, value in done.weights.items() if value.is_floating_point()}
    if broken := [key for key, value in floats.items() if not value.isfinite().all()]:
        raise WrongError(f"not finite: {broken[0]}")
    wanted = torch.bfloat16 if precision == "bf16-true" else torch.float32
    if wrong := [f"{key} of {value.dtype}" for key, value in floats.items() if value.dtype != wanted]:
        raise WrongError(f"other types than without the method: {', '.join(wrong[:3])}")
    if done.weights.keys() != exact.weights.keys():
        raise WrongError("another structure than in single precision")
    zeros, theirs = (sum(int((value == 0).sum()) for value in of.weights.values()) for of in (done, exact))
    if done.kind.lane == Lane.MASK and zeros != theirs:
        raise WrongError(f"{zeros} zeros, {theirs} in single precision")
    if done.kind is NMSparsity:
        layers = {f"network.blocks.{block}.conv{one}": PATTERN for block in range(4) for one in (1, 2)}
        if lost := [proof.name for proof in prove_nm(done.module, layers) if proof.exact_groups != proof.groups]:
            raise WrongError(f"not 2:4: {lost[0]}")
    off = max(abs(one - other) / abs(other) for one, other in zip(done.losses, exact.losses, strict=True))
    if not off <= NEAR:
        raise WrongError(f"losses {done.losses} and {exact.losses} in single precision")
    return off


def check_skipped(name: str, device: str) -> None:
    """Hold a training in which the scaler skips batches that come again against one in which they come once."""
    batches = [0, 1, 0, 1, 0, 1, 0]
    once = _stepped(name, device, batches, ())
    twice = [batch for place, batch in enumerate(batches) for batch in [batch] * (2 if place in (0, 2) else 1)]
    again = _stepped(name, device, twice[: len(batches)], AGAIN)
    left = [
        {"optimizer": of.state["optimizer_states"], "methods": _decided(of), "weights": _trained(of)} for of in (once, again)
    ]
    if (found := difference(*left)) is not None:
        raise WrongError(f"a step that the scaler skipped: {found}")


def _stepped(name: str, device: str, batches: Sequence[int], overflows: Sequence[int]) -> Fit:
    order = [4 * batch + sample for batch in batches for sample in range(4)]
    return fit(CASES[name], "16-mixed", device, order, [Scale(overflows, STEPS)], epochs=1)


def _decided(done: Fit) -> dict[str, Any]:
    """States of methods without what they saw of samples, which a batch that comes twice shows them twice."""
    of_samples = done.kind.rank_state | BY_SAMPLE
    states = {name: state["state"].items() for name, state in done.state["callbacks"].items()}
    return {name: {key: value for key, value in state if key not in of_samples} for name, state in states.items()}


def _trained(done: Fit) -> dict[str, Tensor]:
    return {name: value for name, value in done.weights.items() if not name.endswith("num_batches_tracked")}


def main(names: Sequence[str]) -> None:
    """Try methods in every precision."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in names or CASES:
        for precision in PRECISIONS:
            found = outcome(name, precision)
            print(f"{SIGNS[found.what]} {name:20} {precision:10} {found.words}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
