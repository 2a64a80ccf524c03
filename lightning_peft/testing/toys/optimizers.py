"""An optimizer that stands around the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.optim import Optimizer

from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.run import Run
from lightning_peft.method import Method
from lightning_peft.optim.wrapped import WrappedOptimizer
from lightning_peft.structure.edits import Change
from lightning_peft.testing.toys.gradients import with_gradient


class Lookahead(WrappedOptimizer):
    """Every few steps of an optimizer, goes back most of the way (Zhang et al., NeurIPS 2019, algorithm 1)."""

    def __init__(self, inner: Optimizer, every: int, share: float) -> None:
        super().__init__(inner)
        self.every, self.share = every, share

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        starts = {p: p.clone() for p in parameters if "slow" not in self.state.get(p, ())}
        loss = self.inner.step(closure)
        for parameter in with_gradient(self):
            state = self.state[parameter]
            if "slow" not in state:  # not before: Adam takes a state that holds something for its own
                state |= {"slow": starts[parameter], "slow_steps": 0}
            state["slow_steps"] += 1
            if state["slow_steps"] % self.every == 0:
                parameter.copy_(state["slow"].lerp_(parameter, self.share))
        return loss

    def begin_again(self) -> None:
        """Let slow weights begin at what the weights are now."""
        for state in self.state.values():
            state.pop("slow", None)
            state.pop("slow_steps", None)


class ToyLookahead(Method):
    """Wraps every optimizer."""

    lane = Lane.GRADIENT
    writes = frozenset({Resource.OPTIMIZER})
    paper = "Zhang et al., NeurIPS 2019, https://arxiv.org/abs/1907.08610"

    def __init__(self, every: int = 3, share: float = 0.5, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.every, self.share = every, share

    def wrap_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        return Lookahead(optimizer, self.every, self.share)

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        for optimizer in module.trainer.optimizers:
            if isinstance(optimizer, Lookahead):
                optimizer.begin_again()
