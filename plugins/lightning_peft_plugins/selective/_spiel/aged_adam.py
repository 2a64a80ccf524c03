"""Adam whose bias correction goes by the age of each coordinate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_peft import WrappedOptimizer
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.weights.shards import spread_as


class AgedAdam(WrappedOptimizer):
    """Stands before Adam or AdamW, and takes the steps of some parameters itself.

    They are Adam's own, but for the number of steps in the correction of a bias: each coordinate has its own. While all are as
    old as the training, the result is that of Adam. The ages are not part of the optimizer's state, whose tensors take the type
    of their parameter when it is loaded: in half precision nothing grows older than 256.

    Args:
        inner: The optimizer.
        ages: Returns those parameters, each with the ages of its coordinates in single precision.

    Raises:
        MisconfigurationException: It is used in a form of its own that this is not.
    """

    def __init__(self, inner: Optimizer, ages: Callable[[], Mapping[nn.Parameter, Tensor]]) -> None:
        super().__init__(inner)
        self._ages = ages
        for name in ("amsgrad", "maximize", "fused", "capturable", "differentiable"):
            if any(group.get(name) for group in inner.param_groups):
                raise MisconfigurationException(
                    f"SpIEL counts the age of every coordinate in {type(inner).__name__}, which {name}=True has no room for. "
                    f"Make the optimizer without {name}=True."
                )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step: the inner optimizer's, and that of the parameters whose coordinates have ages."""
        held: dict[nn.Parameter, Tensor] = {}

        def computed() -> Any:
            loss = None if closure is None else closure()
            for parameter in trained_by(self.inner).intersection(self._ages()):
                if parameter.grad is not None:
                    held[parameter], parameter.grad = parameter.grad, None
            return loss

        if closure is None:
            computed()
        loss = self.inner.step(None if closure is None else computed)  # type: ignore[arg-type]
        ages = self._ages()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in held:
                    self._update(parameter, held[parameter], ages[parameter], group)
                    parameter.grad = held[parameter]
        return loss

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter, gradient: Tensor, age: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state.update({key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")})
        rate, (beta1, beta2) = float(group["lr"]), group["betas"]
        state["step"] += 1
        age.add_(1)
        grown: Tensor = spread_as(parameter, age)
        if group["weight_decay"]:
            if group.get("decoupled_weight_decay") or isinstance(self.inner, torch.optim.AdamW):
                parameter.mul_(1 - rate * group["weight_decay"])
            else:
                gradient = gradient.add(parameter, alpha=group["weight_decay"])
        first = state["exp_avg"].lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (second.sqrt() / (1 - beta2**grown).sqrt()).add_(group["eps"])
        parameter.sub_(first / size * (rate / (1 - beta1**grown)))


def counts_ages(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one that this can stand before."""
    return isinstance(optimizer, Adam)
