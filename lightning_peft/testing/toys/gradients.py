"""Gradients that are changed, and steps that are evaluated once more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.run import Run
from lightning_peft.compose.step_closure import StepClosure
from lightning_peft.method import Method
from lightning_peft.testing.trace import difference


class ToyNoise(Method):
    """Changes gradients: adds Gaussian noise to them before they are clipped (Neelakantan et al., 2015)."""

    lane = Lane.GRADIENT
    writes = frozenset({Resource.GRADIENT})
    commutes = True
    paper = "Neelakantan et al., 2015, https://arxiv.org/abs/1511.06807"

    def __init__(self, deviation: float = 0.01, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.deviation = deviation

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        # From the step, not from a generator that goes on: a resumed training draws the same, and so does every rank.
        generator = torch.Generator().manual_seed(run.step)
        for parameter in with_gradient(optimizer):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad.add_(noise.to(parameter), alpha=self.deviation)  # type: ignore[union-attr]


class ToySAM(Method):
    """Takes the gradients where the loss is highest near the weights (Foret et al., ICLR 2021, equations 2 and 3)."""

    lane = Lane.GRADIENT
    writes = frozenset({Resource.GRADIENT})
    paper = "Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412"

    def __init__(self, radius: float = 0.05, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.radius = radius

    def compute_gradients(self, run: Run, optimizer: Optimizer, closure: StepClosure) -> None:
        closure()
        parameters = with_gradient(optimizer)
        norm = torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters]).norm()
        if norm == 0 or not norm.isfinite():  # a gradient scaler will skip this step
            return
        with moved(parameters, [p.grad * (self.radius / norm) for p in parameters]):
            closure.again()


class ToyTwice(Method):
    """Evaluates every step once more, which must give the same gradients and leave nothing that tells of it."""

    lane = Lane.REPORT

    def compute_gradients(self, run: Run, optimizer: Optimizer, closure: StepClosure) -> None:
        closure()
        first = {parameter: parameter.grad for parameter in with_gradient(optimizer)}
        closure.again()
        names = {id(parameter): name for name, parameter in run.module.named_parameters()}
        differing = [names[id(p)] for p, gradient in first.items() if difference(gradient, p.grad) is not None]
        assert not differing, f"evaluated once more, a step has other gradients: {', '.join(differing)}"
        for parameter, gradient in first.items():
            parameter.grad = gradient


def with_gradient(optimizer: Optimizer) -> list[nn.Parameter]:
    """Parameters that a step is about to move, in the order of the groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]


@contextmanager
@torch.no_grad()
def moved(parameters: Sequence[nn.Parameter], by: Sequence[Tensor]) -> Iterator[None]:
    """Within it parameters are elsewhere; afterwards, also if the loss was not finite there, they are what they were."""
    before = [parameter.clone() for parameter in parameters]
    try:
        for parameter, distance in zip(parameters, by, strict=True):
            parameter.add_(distance)
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
