"""A weight map: one function between the tensor an optimizer stores and the weight a layer uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_peft.compose.lanes import Lane


class WeightMap(nn.Module):
    """One function on one stored tensor; subclasses define :meth:`forward` and, when they need one, ``right_inverse``.

    Learnable parameters are ordinary ``nn.Parameter`` attributes. Tensors that must not be averaged by EMA or saved (masks)
    are plain attributes: they follow the module across devices but are no buffers, because averaging buffers turns a mask
    into fractions.

    Attributes:
        kind: Name under which a checkpoint records the map.
        lane: Where the map stands on its tensor.
        optimizer_overrides: Hyperparameters of the parameter group its own parameters train in, for instance
            ``{"weight_decay": 0.0}``.
        lr_scale: Factor on the learning rate of that group.
    """

    kind: ClassVar[str]
    lane: ClassVar[Lane]
    owner: str = ""  # name of the method that attached the map; set by Method.map_weight
    optimizer_overrides: ClassVar[dict[str, float]] = {}
    lr_scale: float = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        """Map the value coming from the lane below to the value for the lane above; same shape and dtype."""
        raise NotImplementedError

    def bake(self, weight: Tensor) -> Tensor:
        """Map a value for good; differs from :meth:`forward` only where training sees something softer."""
        return self.forward(weight)

    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain data, so that a file can be baked without the model's class."""
        return {}

    def detached(self) -> None:
        """Let go of whatever else than its tensor the map holds on to; called when it is taken off."""

    def record(self) -> dict[str, Any]:
        """Describe the map for a checkpoint, as plain data."""
        return {"map": self.kind, "method": self.owner, "config": self.config()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightMap:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, fn(value))
        return self
