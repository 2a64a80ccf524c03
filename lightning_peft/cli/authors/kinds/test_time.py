"""A test-time method: it answers the calls of a trained network while a Trainer tests, validates or predicts."""

from __future__ import annotations

from lightning_peft.cli.authors.kinds.kind import Kind

METHOD = '''\
"""$name: say in one line what it does."""

from __future__ import annotations

from typing import Any

from lightning_peft import Lane, Method, Resource
from lightning_peft.capture.evaluation import Call
from lightning_peft.network.logits import as_logits, with_logits
from $functions import $snake


class $name(Method):
    """Say in one sentence what it does, with authors, year and equation.

    Args:
        strength: Share of the correction.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs.
    """

    lane = Lane.ADAPT
    reads = frozenset({Resource.LOGITS})
    writes = frozenset({Resource.PREDICTIONS})
    paper = "authors, title, venue and year, address"

    def __init__(self, strength: float = 1.0, network: str | None = None, name: str | None = None) -> None:
        super().__init__(network=network, name=name)
        self.strength = strength

    def adapt(self, call: Call) -> Any:
        output = call()
        return with_logits(output, $snake(as_logits(output), self.strength))
'''

FUNCTIONS = '''\
"""The mathematics of $name as pure functions: tensors in, tensors out."""

from __future__ import annotations

from torch import Tensor


def $snake(logits: Tensor, strength: float) -> Tensor:
    """Logits less the logarithm of the batch's mean prediction: write your own formula here.

    Args:
        logits: Shape ``(batch, ..., classes)``.
        strength: Share of the correction.

    Returns:
        The shape of ``logits``.

    Example:
        >>> import torch
        >>> $snake(torch.zeros(4, 2), 1.0)[0]
        tensor([0.6931, 0.6931])
    """
    return logits - strength * logits.softmax(-1).mean(0, keepdim=True).log()
'''

TEST = """\
from __future__ import annotations

import torch

$imports


def predictions(*methods: $name) -> list[torch.Tensor]:
    torch.manual_seed(0)
    module = Plain()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    found = trainer(callbacks=list(methods)).predict(module, loader())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items()), "the module is as it was"
    return found


def test_each_batch_is_answered_with_the_formula() -> None:
    for plain, adapted in zip(predictions(), predictions($name(strength=0.5)), strict=True):
        assert torch.equal(adapted, $snake(plain, 0.5))
        assert not torch.equal(adapted, plain)


def test_the_formula_by_hand() -> None:
    logits = torch.tensor([[1.0, 1.0], [3.0, 1.0]]).log()  # predictions 1/2, 1/2 and 3/4, 1/4
    expected = torch.tensor([[1 / 0.625, 1 / 0.375], [3 / 0.625, 1 / 0.375]])
    torch.testing.assert_close($snake(logits, 1.0).exp(), expected)
"""

TEST_TIME = Kind(
    name="test-time",
    goal="robust at test time",
    needs="classification",
    method=METHOD,
    functions=FUNCTIONS,
    test=TEST,
    tools="Plain, loader, trainer",
    arguments="| `strength` | 1.0 | share of the correction |\n| `network`, `name` | `None` | see `Method` |",
    composes="Every method that trains. Not with another method that changes predictions.",
)
