"""Optimizer steps that a ``training_step`` takes by itself while Lightning is to take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_peft.compose.lanes import Lane
from lightning_peft.compose.run import Run
from lightning_peft.contract import Contract
from lightning_peft.optim.optimizers import trained_by


class HandSteps:
    """Watches every training step of a fit, and refuses a module whose steps no method can see.

    A step that returns no loss is skipped by Lightning, and rightly so now and then. One that trains by itself, or trains with
    optimizers that Lightning does not know, would let every method do nothing without a word.

    Args:
        run: The run.
        methods: All methods; those that only evaluate or report do not mind.
    """

    def __init__(self, run: Run, methods: Sequence[Contract]) -> None:
        self._run = run
        self._names = ", ".join(method.name for method in methods if method.lane < Lane.ADAPT)
        self._inside = self._stepped = False
        self._strangers = self._returned = False
        self._batches, self._step = 0, 0
        self._handle = register_optimizer_step_post_hook(self._see)

    def remove(self) -> None:
        """Stop watching."""
        self._handle.remove()

    def _see(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._inside and not trained_by(optimizer).isdisjoint(self._run.module.parameters()):
            self._stepped = True
            self._strangers |= all(optimizer is not known for known in self._run.trainer.optimizers)

    def watch(self, training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a training step and return what it returned.

        Raises:
            MisconfigurationException: It took steps by itself that methods cannot see.
        """
        self._inside, self._stepped = True, False
        try:
            output = training_step(*args, **kwargs)
        finally:
            self._inside = False
        self._batches += 1
        self._returned |= output is not None
        automatic = self._run.module.automatic_optimization
        if self._names and self._stepped and (self._unknown_only() or (automatic and output is None)):
            raise self._refusal("takes optimizer steps by itself")
        return output

    def _unknown_only(self) -> bool:
        return trained_by(*self._run.trainer.optimizers).isdisjoint(self._run.module.parameters())

    def end_epoch(self) -> None:
        """Look back at an epoch.

        Raises:
            MisconfigurationException: No step of it returned a loss to Lightning, or none was taken by an optimizer it knows.
        """
        automatic, moved = self._run.module.automatic_optimization, self._run.step > self._step
        if self._names and self._batches:
            if automatic and not self._returned:
                raise self._refusal("returned no loss in a whole epoch")
            if self._strangers and not moved:
                raise self._refusal("takes steps only with optimizers that configure_optimizers did not return")
        self._strangers = self._returned = False
        self._batches, self._step = 0, self._run.step

    def _refusal(self, what: str) -> MisconfigurationException:
        return MisconfigurationException(
            f"{type(self._run.module).__name__}.training_step {what}, so {self._names} would see no loss and no step. "
            "Return the loss and let Lightning step; or set self.automatic_optimization = False, step what self.optimizers() "
            "gives, and write loss = lightning_peft.apply_terms(self, loss) before manual_backward."
        )
