"""An evaluation in which a method adapts: the calls of the network go through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_peft.capture.evaluation import EvaluationShim, Passes
from lightning_peft.capture.tap import step_compiler
from lightning_peft.compose.run import Run
from lightning_peft.contract import Contract


class Adapting:
    """Stands in front of the network as long as an evaluation lasts.

    Args:
        run: The run; its network is known.
        method: The method that adapts.
        finish: Ends a method, the first time.
    """

    def __init__(self, run: Run, method: Contract, finish: Callable[[Contract], None]) -> None:
        self._run, self._method, self._finish = run, method, finish
        self._shim = EvaluationShim(run.network, method.adapt, step_compiler(run.module)).install()

    @property
    def passes(self) -> Passes:
        """Counts of the network's passes."""
        return self._shim.passes

    def begin(self) -> None:
        """Let calls go through the method from now on."""
        self._shim.active = True

    def note(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Note the batch whose calls come."""
        self._shim.place = (batch_idx, dataloader_idx, batch)

    def swap_back(self, inner: Callable[..., None], *args: Any) -> None:
        """Let the method give back what it adapted, an average of the weights, before that leaves the module."""
        if self._shim.active:
            self._shim.active = False
            with torch.inference_mode(False), torch.no_grad():
                self._finish(self._method)
        inner(*args)

    def log(self) -> None:
        """Log what the method says of the batch, averaged over the evaluation."""
        for key, value in self._method.metrics(self._run).items():
            name = f"peft/{self._method.name}/{key}"
            self._run.module.log(name, float(value), on_step=False, on_epoch=True, batch_size=1)

    def remove(self) -> None:
        """Leave the network as it is."""
        self._shim.remove()
