"""Gradients of another loss of a step, before its own backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_peft.compose.run import Run
from lightning_peft.strategies.sharding import reshard
from lightning_peft.strategies.support import shards


def gradients_beside(run: Run, loss: Tensor, of: Callable[[], Mapping[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Return the gradients of a loss whose graph stays for another backward pass; those that parameters have are left alone.

    Args:
        run: The run.
        loss: A scalar.
        of: Returns the parameters by name. It is asked when the pass is over, where they are shards by then.

    Returns:
        Of parameters with a gradient, by name. A whole one is that of this process; one in shards is the mean over processes.
    """
    if not shards(run.trainer.strategy):
        parameters = of()
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}
    # FSDP reduces what a backward pass leaves as .grad, and nothing else comes by its shards.
    reshard(run.module)
    held = [(parameter, parameter.grad) for parameter in run.module.parameters()]
    for parameter, _ in held:
        parameter.grad = None
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in of().items() if parameter.grad is not None}
    for parameter, gradient in held:
        parameter.grad = gradient
    return gradients
