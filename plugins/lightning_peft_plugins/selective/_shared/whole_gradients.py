"""Gradients of frozen weights as a whole, for some steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_peft import Run
from lightning_peft.optim.optimizers import owner
from lightning_peft.strategies.ranks import mean_over_ranks
from lightning_peft.weights.shards import whole


class WholeGradients:
    """Has frozen weights get a gradient while they are watched. Neither optimizers nor DDP look at it."""

    def __init__(self) -> None:
        self._watched: set[nn.Parameter] = set()

    def watch(self, weights: Iterable[nn.Parameter]) -> None:
        """Have weights get a gradient from the next backward pass on."""
        for weight in weights:
            if not weight.requires_grad:
                weight.requires_grad_(True)
                self._watched.add(weight)

    def take(self, run: Run, weight: nn.Parameter) -> Tensor | None:
        """Take a weight's gradient away before an optimizer steps.

        Returns:
            The mean over processes, spread as the weight is; ``None`` where the weight is not watched, no layer was called
            with it, or a gradient scaler will skip the step.
        """
        if weight not in self._watched:
            return None
        gradient, weight.grad = weight.grad, None
        if gradient is None and run.trainer.world_size == 1:
            return None
        found = torch.zeros_like(weight) if gradient is None else gradient / self.scale(run, weight)
        found = mean_over_ranks(run.trainer.strategy, found)
        return found if whole(found.any()) and whole(found.isfinite().all()) else None

    @staticmethod
    def scale(run: Run, weight: nn.Parameter) -> float:
        """What a gradient scaler multiplied a gradient with: it takes that from the gradients of optimizers alone."""
        scaler = run.gradient_scaler
        return 1.0 if scaler is None or owner(run.trainer.optimizers, weight) is not None else float(scaler.get_scale())

    def close(self) -> None:
        """Freeze the weights again."""
        for weight in self._watched:
            weight.requires_grad_(False)
            weight.grad = None
        self._watched.clear()
