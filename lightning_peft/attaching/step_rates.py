"""Factors that methods put on learning rates, for single optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_peft.contract import Contract


class StepRates:
    """Multiplies learning rates for one step only, so that schedulers, which compute from the last one, never see it.

    Args:
        methods: All methods; those that leave :meth:`~lightning_peft.Method.lr_factor` as it is are not asked.
        wanted: Whether factors apply at the moment.
    """

    def __init__(self, methods: Iterable[Contract], wanted: Callable[[], bool]) -> None:
        self._methods = [method for method in methods if type(method).lr_factor is not Contract.lr_factor]
        self._wanted = wanted
        self._unscaled: list[tuple[dict[str, Any], Any]] = []

    def follow(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Scale every step of an optimizer from now on."""
        return [optimizer.register_step_pre_hook(self._scale)] if self._methods else []

    def _scale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        factor = math.prod(map(lr_factor_of, self._methods)) if self._wanted() else 1.0
        if factor != 1.0:
            self._unscaled = [(group, group["lr"]) for group in optimizer.param_groups]
            for group, lr in self._unscaled:
                group["lr"] = lr * factor

    def give_back(self) -> None:
        """Undo the factor of a step that was taken."""
        for group, lr in self._unscaled:
            group["lr"] = lr
        self._unscaled = []


def lr_factor_of(method: Contract) -> float:
    """Return what a method multiplies learning rates with.

    Raises:
        MisconfigurationException: It is no number from 0: the step would climb, or end in NaN.
    """
    factor = method.lr_factor()
    if not (math.isfinite(factor) and factor >= 0.0):
        raise MisconfigurationException(
            f"{method.name} multiplies learning rates by {factor} at step {method.steps}; lr_factor() must return a finite "
            "number, 0 or more. No weight was changed in this step: remove the method from callbacks=, or fix its "
            "lr_factor()."
        )
    return factor
