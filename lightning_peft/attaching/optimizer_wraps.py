"""Optimizers that methods put before, or in the place of, those of the user."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_peft.compose.run import Run
from lightning_peft.contract import Contract, overrides
from lightning_peft.optim.wrapped import take_place


def wrap_optimizers(run: Run, methods: Sequence[Contract]) -> None:
    """Let methods wrap or replace every optimizer of a fit, in plan order.

    Call it when the strategy has made the optimizers and no checkpoint has restored them. What methods give stays with the
    Trainer after the fit, for it fills the checkpoints that are saved then.

    Raises:
        MisconfigurationException: A method returned no optimizer, or one with other parameter groups.
    """
    wrapping = [method for method in methods if overrides(method, "wrap_optimizer")]
    if wrapping:
        # The setter of the strategy makes the LightningOptimizers anew, which is what steps them.
        run.trainer.strategy.optimizers = [_wrapped(run, wrapping, optimizer) for optimizer in run.trainer.optimizers]


def _wrapped(run: Run, methods: Sequence[Contract], optimizer: Optimizer) -> Optimizer:
    for method in methods:
        found = method.wrap_optimizer(run, optimizer)
        if found is optimizer:
            continue
        if not isinstance(found, Optimizer) or not take_place(found, optimizer):
            raise MisconfigurationException(
                f"{method.name}.wrap_optimizer returned a {type(found).__name__} whose parameter groups are not those of the "
                f"{type(optimizer).__name__} it was given, so learning-rate schedulers would change groups that no optimizer "
                "uses. Subclass lightning_peft.WrappedOptimizer, or build the new optimizer from optimizer.param_groups."
            )
        optimizer = found
    return optimizer
