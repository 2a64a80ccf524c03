"""The files of a new method: a small loss term that works as it is, so that its author changes a method that passes all tests.

They are filled in as :class:`string.Template` does it.
"""

from __future__ import annotations

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

CARD = """\
---
goals: [better accuracy]
domains: [any]
needs: classification
saves: say what it saves, or nothing
cost: not yet measured
paper: authors and year
code: none found
licence: none
---
# $name

Say in one sentence, of 60 characters, what it does.

## Sources

Authors, *title*, venue, arXiv number; official code and its licence. The code here is our own.

## Algorithm

The equations.

## Where paper and code differ

And which of the two is followed.

## Arguments

| argument | default | meaning |
| --- | --- | --- |
| `strength` | 0.1 | weight of the term |
| `network`, `name` | `None` | see `Method` |

## Cost

Not yet measured.

## Composes with

Masks, weight maps, accumulation, mixed precision, DDP, EMA and SWA.

## Limits

What it cannot do.

## Evidence

`$test`.
"""

PROJECT = """\
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "$package"
version = "0.1.0"
description = "$name for lightning_peft."
requires-python = ">=3.10"
dependencies = ["lightning-peft"]

[project.entry-points."lightning_peft.plugins"]
$name = "$module:$name"

[project.entry-points."lightning_peft.functional"]
$snake = "$functions:$snake"

[tool.hatch.build.targets.wheel]
packages = ["$package"]

[tool.pytest.ini_options]
testpaths = ["tests", "$package"]
addopts = "--doctest-modules"
"""
