"""LoRA in plain torch, for loops that say what a method does to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.network.seeds import named_seed
from lightning_peft.testing import Task


@dataclass
class Thin:
    """A layer with its factors.

    Attributes:
        name: Name of its weight.
        layer: The layer, frozen.
        down: ``A``.
        up: ``B``.
    """

    name: str
    layer: nn.Linear
    down: Tensor
    up: Tensor

    @property
    def product(self) -> Tensor:
        """``B A``."""
        return self.up @ self.down


def thin(task: Task, method: str, rank: int) -> list[Thin]:
    """The linear layers of a task's module with the factors that a method of this name begins with."""
    found = []
    for name, layer in task.module.named_modules():
        if isinstance(layer, nn.Linear):
            layer.requires_grad_(False)
            seed = torch.Generator().manual_seed(named_seed(f"{method}/{name}.weight"))
            bound = 1 / math.sqrt(layer.in_features)
            down = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=seed)
            up = torch.zeros(layer.out_features, rank)
            found.append(Thin(f"{name}.weight", layer, down.requires_grad_(), up.requires_grad_()))
    return found


def answers(inputs: Tensor, layers: list[Thin], weights: list[Tensor]) -> Tensor:
    """What the network says with these weights."""
    for place, (each, weight) in enumerate(zip(layers, weights, strict=True)):
        inputs = (inputs.relu() if place else inputs) @ weight.T + each.layer.bias
    return inputs


def train(task: Task, layers: list[Thin], step: Callable[[int, Tensor, Tensor], Tensor]) -> list[float]:
    """Train factors as the task's optimizer would, and leave their products in the weights.

    Args:
        task: The task.
        layers: Its layers.
        step: Of the number of a step, inputs and labels: leaves gradients on the factors and returns the module's own loss.

    Returns:
        The losses.
    """
    factors = [factor for each in layers for factor in (each.down, each.up)]
    optimizer, losses = torch.optim.Adam(factors, lr=task.optimizer.defaults["lr"]), []
    for number, (inputs, labels) in enumerate(task.batches):
        optimizer.zero_grad()
        losses.append(float(step(number, inputs, labels).detach()))
        optimizer.step()
    with torch.no_grad():
        for each in layers:
            each.layer.weight += each.product
    return losses
