"""Callbacks of the command line: time, a line an epoch, and a progress bar where there is a terminal."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from lightning_peft.measure.flop_count import FlopCount
from lightning_peft.measure.flop_meter import SECONDS, in_training
from lightning_peft.network.batches import tensors_of
from lightning_peft.network.compiled import is_compiled
from lightning_peft.report.trial import duration, show
from lightning_peft.strategies.ranks import of_ranks


class Stopwatch(Callback):
    """Seconds spent in ``fit``, summed over the sessions of a resumed run, and logged beside the validation metrics."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._since = time.perf_counter()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the time so far, in the row of the validation metrics."""
        if in_training(trainer):
            pl_module.log(SECONDS, self.total(), sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self.seconds = self.total()
        self._since = None

    def total(self) -> float:
        """Seconds until now."""
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def state_dict(self) -> dict[str, Any]:
        """Seconds until now."""
        return {"seconds": self.total()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds = float(state_dict["seconds"])


class ForwardMeter(Callback):
    """Counts the FLOPs of the first test batch, in the way FlopMeter counts those of training.

    Attributes:
        flops: FLOPs a sample; 0 when they are not known.
    """

    def __init__(self) -> None:
        self.flops = 0.0
        self._counting = ExitStack()
        self._count: FlopCount | None = None

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begin with the first batch."""
        if batch_idx == dataloader_idx == 0 and not is_compiled(pl_module):
            self._count = self._counting.enter_context(FlopCount())

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Divide by the samples of the batch."""
        self._counting.close()
        if self._count is not None:
            tensors = [tensor for tensor in tensors_of(batch) if tensor.dim()]
            self.flops = self._count.total / len(tensors[0]) if tensors and len(tensors[0]) else 0.0
        self._count = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        self._counting.close()


class RandomState(Callback):
    """Keeps the random states in checkpoints, so that a resumed run draws what the whole one would have drawn.

    Lightning does not: a resumed ``RandomSampler`` would repeat the order of the first epoch.
    """

    def state_dict(self) -> dict[str, Any]:
        """Random states of Python, NumPy, PyTorch and every CUDA device, as plain data; in several processes those of each."""
        ranks = of_ranks(self._own())
        return {**ranks[0], "ranks": ranks[1:]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the states back; the next to draw is the loader of the next epoch."""
        rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
        ranks = state_dict.get("ranks", [])
        self._put_back(ranks[rank - 1] if 0 < rank <= len(ranks) else state_dict)

    @staticmethod
    def _own() -> dict[str, Any]:
        version, internal, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        return {
            "python": [version, list(internal), gauss],
            "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    @staticmethod
    def _put_back(states: dict[str, Any]) -> None:
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(states["torch"])
        if states["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(states["cuda"])


class EpochLines(Callback):
    """Prints one line an epoch: the metrics on the progress bar and the time so far.

    Args:
        console: Where to print.
        name: Name of the run.
        stopwatch: Clock of the run.
    """

    def __init__(self, console: Console, name: str, stopwatch: Stopwatch) -> None:
        self.console = console
        self.name = name
        self.stopwatch = stopwatch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("peft/")}
        shown = "  ".join(f"[dim]{name}[/] {show(name, value)}" for name, value in sorted(metrics.items()))
        last = trainer.max_epochs
        place = f"epoch {trainer.current_epoch + 1}{f'/{last}' if last is not None and last > 0 else ''}"
        took = duration(self.stopwatch.total())
        self.console.print(f"  [bold]{self.name}[/] {place}  {shown}  [dim]{took}[/]", highlight=False, soft_wrap=True)
