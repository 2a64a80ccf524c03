"""What the network of a step answers without a method."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.compose.loss import Step
from lightning_peft.network.logits import as_logits
from lightning_peft.network.modes import modes_kept
from lightning_peft.weights.switch import switch


@torch.no_grad()
def frozen_answers(step: Step, method: str) -> Tensor:
    """Run the network on the inputs of a step once more, in evaluation mode and without what a method attached.

    No other method sees this call: the latest call of the step stays the one of the user's ``training_step``.

    Args:
        step: The step.
        method: Name of the method.

    Returns:
        Logits without a gradient.
    """
    network, call = step.run.network, step.call
    assert step.tap is not None
    with switch(step.run.module, method, on=False), modes_kept(network), step.tap.paused():
        return as_logits(network(*call.args, **call.kwargs))
