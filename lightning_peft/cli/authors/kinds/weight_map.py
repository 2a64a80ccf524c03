"""A weight map: a trained function between the value that the optimizer stores and the weight that the layer sees."""

from __future__ import annotations

from lightning_peft.cli.authors.kinds.kind import Kind

METHOD = '''\
"""$name: say in one line what it does."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Lane, Method, Resource, WeightMap
from lightning_peft.network.targets import TargetSpec
from $functions import $snake


class ${name}Map(WeightMap):
    """Stands between the stored value of one tensor and the weight that its layer sees.

    A mask is a map too: its lane is ``Lane.MASK``, it has no ``right_inverse``, and its method writes ``Resource.MASK``.

    Args:
        start: First value of ``scale``.
    """

    kind = "$snake"
    lane = Lane.REPARAM
    optimizer_overrides = {"weight_decay": 0.0}  # of the parameters of the map

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.start = start
        self.scale = nn.Parameter(torch.tensor(start))

    def forward(self, weight: Tensor) -> Tensor:
        return $snake(weight, self.scale)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the stored value under which the layer sees ``weight``, so that attaching the map changes nothing."""
        return weight / self.scale

    def config(self) -> dict[str, Any]:
        return {"start": self.start}


class $name(Method):
    """Say in one sentence what it does, with authors, year and equation.

    Args:
        scale: First value of the number that each weight is multiplied by.
        targets: Layers whose ``weight`` is mapped.
        exclude: Layers to leave alone.
        name: Name in logs and checkpoints.
    """

    lane = Lane.REPARAM
    writes = frozenset({Resource.WEIGHT_MAP})
    weight_maps = (${name}Map,)
    paper = "authors, title, venue and year, address"

    def __init__(
        self,
        scale: float = 1.0,
        targets: TargetSpec = "all-weights",
        exclude: TargetSpec | None = ("embedding",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.scale = scale

    def attach(self, module: LightningModule) -> None:
        for tensor in self.claims(module):
            self.map_weight(module, tensor, ${name}Map(self.scale))
'''

FUNCTIONS = '''\
"""The mathematics of $name as pure functions: tensors in, tensors out."""

from __future__ import annotations

from torch import Tensor


def $snake(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight times a number: write your own formula here.

    Args:
        weight: Stored value, of any shape.
        scale: A scalar.

    Returns:
        The weight that the layer sees, of the shape of ``weight``.

    Example:
        >>> import torch
        >>> $snake(torch.tensor([1.0, -3.0]), torch.tensor(2.0))
        tensor([ 2., -6.])
    """
    return weight * scale
'''

TEST = """\
from __future__ import annotations

import torch

$imports


class Test$name(MethodTester):
    methods = [$name, lambda: $name(scale=2.0)]  # one function per configuration


def test_the_formula_by_hand() -> None:
    assert $snake(torch.tensor([[1.0, -3.0]]), torch.tensor(0.5)).tolist() == [[0.5, -1.5]]
"""

WEIGHT_MAP = Kind(
    name="weight-map",
    goal="better accuracy",
    needs="linear layers or convolutions",
    method=METHOD,
    functions=FUNCTIONS,
    test=TEST,
    tools="MethodTester",
    arguments=(
        "| `scale` | 1.0 | first value of the number that a weight is multiplied by |\n"
        '| `targets` | `"all-weights"` | layers whose weight is mapped |\n'
        "| `exclude` | embeddings | layers to leave alone |\n"
        "| `name` | `None` | see `Method` |"
    ),
    composes="Masks, loss terms, accumulation, mixed precision, DDP, averages. Not with another weight map on the same tensor.",
)
