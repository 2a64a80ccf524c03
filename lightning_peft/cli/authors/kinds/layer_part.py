"""A layer part: a small module beside a layer, which sees its calls and changes its output."""

from __future__ import annotations

from lightning_peft.cli.authors.kinds.kind import Kind

METHOD = '''\
"""$name: say in one line what it does."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Lane, LayerPart, Method
from lightning_peft.network.targets import TargetSpec
from $functions import $snake


class ${name}Part(LayerPart):
    """Stands beside one linear layer, sees its inputs and adds to its output.

    Args:
        inputs: Inputs of the layer.
        outputs: Outputs of the layer.
        scale: Factor on the part.
    """

    kind = "$snake"
    lane = Lane.DELTA
    follows = {"down": {0: ("weight", 1)}, "up": {0: ("weight", 0)}}  # when channels of the layer are cut

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self._config = {"inputs": inputs, "outputs": outputs, "scale": scale}
        self.scale = scale
        self.down = nn.Parameter(torch.full((inputs,), inputs**-0.5))
        self.up = nn.Parameter(torch.zeros(outputs))  # zero: the layer starts with the output it had

    def forward(self, output: Tensor, inputs: Tensor) -> Tensor:
        return output + self.scale * $snake(inputs, self.down, self.up)

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight with which the layer computes the same alone; leave this out if there is none."""
        return weight + self.scale * torch.outer(self.up, self.down)

    def config(self) -> dict[str, Any]:
        return self._config


class $name(Method):
    """Say in one sentence what it does, with authors, year and equation.

    Args:
        scale: Factor on the parts.
        targets: Linear layers that get a part.
        exclude: Layers to leave alone.
        name: Name in logs and checkpoints.
    """

    lane = Lane.DELTA
    parts = (${name}Part,)
    paper = "authors, title, venue and year, address"

    def __init__(
        self,
        scale: float = 1.0,
        targets: TargetSpec = "all-linear",
        exclude: TargetSpec | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.scale = scale

    def attach(self, module: LightningModule) -> None:
        for layer, found in self.select(module).items():
            outputs, inputs = found.weight.shape
            self.put_part(module, layer, ${name}Part(inputs, outputs, self.scale))
'''

FUNCTIONS = '''\
"""The mathematics of $name as pure functions: tensors in, tensors out."""

from __future__ import annotations

from torch import Tensor


def $snake(inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The product of the inputs with a matrix of rank one: write your own formula here.

    Args:
        inputs: Shape ``(..., inputs)``.
        down: Shape ``(inputs,)``.
        up: Shape ``(outputs,)``.

    Returns:
        Shape ``(..., outputs)``.

    Example:
        >>> import torch
        >>> $snake(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 4.0]), torch.tensor([1.0, -1.0]))
        tensor([[ 11., -11.]])
    """
    return (inputs @ down).unsqueeze(-1) * up
'''

TEST = """\
from __future__ import annotations

import torch

$imports


class Test$name(MethodTester):
    methods = [$name, lambda: $name(scale=0.5, exclude="head")]  # one function per configuration


def test_the_formula_by_hand() -> None:
    found = $snake(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -3.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert found.tolist() == [0.0, -5.0, -10.0]


def test_the_merged_weight_computes_the_same() -> None:
    part = ${name}Part(inputs=2, outputs=3)
    part.up.data = torch.tensor([0.0, 1.0, 2.0])
    inputs, weight = torch.tensor([[1.0, 2.0]]), torch.arange(6.0).reshape(3, 2)
    torch.testing.assert_close(inputs @ part.merged(weight).T, part(inputs @ weight.T, inputs))
"""

LAYER_PART = Kind(
    name="layer-part",
    goal="cheaper training",
    needs="linear layers",
    method=METHOD,
    functions=FUNCTIONS,
    test=TEST,
    tools="MethodTester",
    arguments=(
        "| `scale` | 1.0 | factor on the parts |\n"
        '| `targets` | `"all-linear"` | layers that get a part |\n'
        "| `exclude`, `name` | `None` | see `Method` |"
    ),
    composes="Weight maps, loss terms, accumulation, mixed precision, DDP, EMA and SWA; not with a mask on the same weight.",
    classes=("$name", "${name}Part"),
)
