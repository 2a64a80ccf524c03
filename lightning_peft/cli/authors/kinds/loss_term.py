"""A loss term: a function of the logits that is added to the loss."""

from __future__ import annotations

from lightning_peft.cli.authors.kinds.kind import Kind

METHOD = '''\
"""$name: say in one line what it does."""

from __future__ import annotations

from torch import Tensor

from lightning_peft import Lane, Method, Resource, Step
from $functions import $snake


class $name(Method):
    """Say in one sentence what it does, with authors, year and equation.

    Args:
        strength: Weight of the term.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.
    """

    lane = Lane.LOSS
    reads = frozenset({Resource.LOGITS})
    paper = "authors, title, venue and year, address"

    def __init__(self, strength: float = 0.1, network: str | None = None, name: str | None = None) -> None:
        super().__init__(network=network, name=name)
        self.strength = strength

    def loss(self, step: Step) -> Tensor:
        return self.strength * $snake(step.logits)
'''

FUNCTIONS = '''\
"""The mathematics of $name as pure functions: tensors in, tensors out."""

from __future__ import annotations

from torch import Tensor


def $snake(logits: Tensor) -> Tensor:
    """Mean of the squared logits: write your own formula here.

    Args:
        logits: Shape ``(batch, ..., classes)``.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> $snake(torch.tensor([[1.0, 3.0]]))
        tensor(5.)
    """
    return logits.square().mean()
'''

TEST = """\
from __future__ import annotations

import torch

$imports


class Test$name(MethodTester):
    methods = [lambda: $name(strength=0.5)]  # one function per configuration


def test_the_formula_by_hand() -> None:
    assert $snake(torch.tensor([[1.0, 3.0], [0.0, 2.0]])) == (1 + 9 + 0 + 4) / 4
"""

LOSS_TERM = Kind(
    name="loss-term",
    goal="better accuracy",
    needs="classification",
    method=METHOD,
    functions=FUNCTIONS,
    test=TEST,
    tools="MethodTester",
    arguments="| `strength` | 0.1 | weight of the term |\n| `network`, `name` | `None` | see `Method` |",
    composes="Masks, weight maps, accumulation, mixed precision, DDP, EMA and SWA.",
)
