"""A layer that is wrapped in the middle of a training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.run import Run
from lightning_peft.method import Method
from lightning_peft.structure.edits import EditRequest
from lightning_peft.structure.journal import journal_of
from lightning_peft.structure.replacement import Replacement


class Adapted(nn.Module):
    """A layer with a bottleneck behind it, which begins as the layer alone."""

    def __init__(self, layer: Any, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.out_features, width), nn.Linear(width, layer.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.layer(inputs)
        adapted: Tensor = output + self.up(self.down(output).relu())
        return adapted


class Adapter(Replacement):
    """Puts a bottleneck behind a linear layer, which goes on inside."""

    kind, inside = "toy_adapter", "layer"

    def __init__(self, width: int = 3) -> None:
        self.width = width

    def config(self) -> dict[str, Any]:
        return {"width": self.width}

    def check(self, layer: nn.Module) -> None:
        fits = isinstance(layer, nn.Linear) and type(self.width) is int and 1 <= self.width <= layer.out_features
        if not fits:
            raise ValueError(f"width={self.width!r} is not a whole number from 1 to the outputs of a linear layer")

    def build(self, layer: nn.Module) -> nn.Module:
        return Adapted(layer, self.width)


class ToyWrap(Method):
    """Wraps the first linear layer in the middle of a training; what was done stands in the module's journal."""

    lane = Lane.STRUCTURE
    writes = frozenset({Resource.STRUCTURE})
    replacements = (Adapter,)

    def __init__(
        self, at: int = 2, width: int = 3, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.at, self.width = at, width

    def claims(self, module: nn.Module) -> list[str]:
        return []

    def next_edit(self, run: Run) -> EditRequest | None:
        if run.step < self.at or any(edit.get("by") == self.name for edit in journal_of(run.module)):
            return None
        edit = self.put(run.module, next(iter(self.select(run.module))), Adapter(self.width))
        return EditRequest(edit | {"by": self.name, "seed": 1})
