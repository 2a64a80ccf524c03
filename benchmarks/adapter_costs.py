"""What a training costs beside its result: trained parameters, a step's time and memory, the size of the file."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deltas import Kept
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_peft import PERP, Method
from lightning_peft.network.tunable import tunable
from lightning_peft_plugins.deltas._shared.delta_method import DeltaMethod

WARMUP = 3  # steps that are not timed


class AdapterCosts(Callback):
    """Measures the fit it is in; goes first among the callbacks.

    A step's time is that of the processor, from one batch to the next, so that other work on the machine matters less. Memory
    is what a step needs beside weights: what autograd keeps for the backward pass, gradients, and the optimizer's state. The
    file is a checkpoint of weights alone, as the method writes it in training.
    """

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.kept = Kept()
        self.trainables = self.file_bytes = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainables = sum(each.numel() for each in pl_module.parameters() if each.requires_grad)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self.begun.append(time.process_time())
        if len(self.begun) == WARMUP:
            self.kept.on_train_batch_start(trainer, pl_module, *batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if len(self.begun) == WARMUP:
            self.kept.on_before_backward()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if len(self.begun) == WARMUP:
            self.kept.on_train_batch_end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensors = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        self.state_bytes = sum(value.nbytes for value in tensors if isinstance(value, Tensor))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trained.ckpt"
            trainer.save_checkpoint(path, weights_only=True)
            self.file_bytes = path.stat().st_size

    def found(self) -> dict[str, float]:
        """Trained parameters, and costs in ms, MB and kB."""
        times = [after - before for before, after in zip(self.begun[WARMUP:], self.begun[WARMUP + 1 :], strict=False)]
        gradients = 4 * self.trainables  # bytes
        return {
            "trainables": self.trainables,
            "step_ms": 1000 * statistics.median(times),
            "memory_mb": (self.kept.bytes + gradients + self.state_bytes) / 1e6,
            "file_kb": self.file_bytes / 1e3,
        }


def closed_count(module: nn.Module, methods: Iterable[Method]) -> int:
    """Count what methods will train by closed formulas, before anything is attached; without methods all that is trainable.

    Args:
        module: The module.
        methods: Members of the deltas' family, and ``PERP`` without maps.
    """
    methods = list(methods)
    if not methods:
        return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    tuned: set[nn.Parameter] = set()
    count = 0
    for method in methods:
        assert isinstance(method, DeltaMethod) or (isinstance(method, PERP) and method.lora is None)
        places = method.places(module) if isinstance(method, DeltaMethod) else []
        count += sum(method.kind.trainable(place.layout, **method.arguments(place)) for place in places)
        tuned.update(tunable(module, method.tune, {place.path for place in places}))
    return count + sum(parameter.numel() for parameter in tuned)
