"""A gradient method: it changes the gradients of a step before they are clipped and used."""

from __future__ import annotations

from lightning_peft.cli.authors.kinds.kind import Kind

METHOD = '''\
"""$name: say in one line what it does."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_peft import Lane, Method, Resource, Run
from $functions import $snake


class $name(Method):
    """Say in one sentence what it does, with authors, year and equation.

    Args:
        strength: Share of the mean that is taken away.
        name: Name in logs and checkpoints.
    """

    lane = Lane.GRADIENT
    writes = frozenset({Resource.GRADIENT})
    paper = "authors, title, venue and year, address"

    def __init__(self, strength: float = 1.0, name: str | None = None) -> None:
        super().__init__(name=name)
        self.strength = strength

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.copy_($snake(parameter.grad, self.strength))
'''

FUNCTIONS = '''\
"""The mathematics of $name as pure functions: tensors in, tensors out."""

from __future__ import annotations

from torch import Tensor


def $snake(gradient: Tensor, strength: float) -> Tensor:
    """The gradient without the mean of each row: write your own formula here.

    Args:
        gradient: Shape ``(outputs, ...)``; those of biases and scalars come back as they are.
        strength: Share of the mean that is taken away.

    Returns:
        The shape of ``gradient``.

    Example:
        >>> import torch
        >>> $snake(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), 1.0)
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    if gradient.ndim < 2:
        return gradient
    return gradient - strength * gradient.mean(tuple(range(1, gradient.ndim)), keepdim=True)
'''

TEST = """\
from __future__ import annotations

import torch

$imports


class Test$name(MethodTester):
    methods = [lambda: $name(strength=0.5)]  # one function per configuration


def test_the_formula_by_hand() -> None:
    assert $snake(torch.tensor([[1.0, 3.0]]), 0.5).tolist() == [[0.0, 2.0]]
    assert $snake(torch.tensor([1.0, 3.0]), 0.5).tolist() == [1.0, 3.0]
"""

GRADIENT = Kind(
    name="gradient",
    goal="better accuracy",
    needs="any network",
    method=METHOD,
    functions=FUNCTIONS,
    test=TEST,
    tools="MethodTester",
    arguments="| `strength` | 1.0 | share of the mean that is taken away |\n| `name` | `None` | see `Method` |",
    composes=(
        "Masks, weight maps, loss terms, accumulation, mixed precision, DDP, EMA and SWA. With another method that changes\n"
        "gradients, `after=` says who comes first."
    ),
)
