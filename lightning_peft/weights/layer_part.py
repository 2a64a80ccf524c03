"""A layer part: a module beside a layer, which sees the layer's calls and has a say in what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_peft.weights.attachment import Attachment

_MERGED = {"weight": "merged", "bias": "merged_bias"}

Follows = Mapping[str, Mapping[int, tuple[str, int]]]


class LayerPart(Attachment):
    """One module beside one layer; subclasses define :meth:`forward`, or :meth:`around` where that is not enough.

    A part that is linear in the weight also defines ``merged(weight) -> weight``: the weight with which the layer computes by
    itself what it computes with the part. The weight is baked with it when the training ends. A part that changes the bias too
    defines ``merged_bias(bias) -> bias`` beside it, and leaves layers that have none without a shift. A part without ``merged``
    is taken off then, and comes back with the next fit or test of the module.

    Attributes:
        order: Where the part stands among those of its lane on one layer, inner ones first; equal ones as they came.
        follows: How a cut of the layer's channels reaches the part's tensors: ``{"down": {1: ("weight", 1)}}`` says that
            dimension 1 of ``down`` loses what dimension 1 of the layer's ``weight`` does. Empty for a part without such
            tensors; ``None`` lets the layer not be cut or widened.
        training_only: Whether the layer does without the part after training, so that nobody is told that it left.
        recorded: Whether checkpoints tell of the part; not of one without tensors that is put there again whatever they say.
        keeps_zeros: Whether ``merged`` leaves the zeros of a weight zero, so that the part can stand beside a mask.
        called: Whether a call of the layer reached it.
    """

    order: ClassVar[int] = 0
    follows: ClassVar[Follows | None] = None
    training_only: ClassVar[bool] = False
    recorded: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = False
    called: bool = False

    def forward(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the new output of a call.

        Args:
            output: What the layer, with the parts below this one, returned.
            *args: What the layer was called with.
            **kwargs: What it was called with by name.
        """
        raise NotImplementedError

    def around(self, call: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the layer; override it to change the inputs, or to read other tensors of the layer.

        Args:
            call: The layer with the parts below this one.
            layer: The layer, for its tensors; not to be called.
            args: What the layer was called with.
            kwargs: What it was called with by name.
        """
        return self.forward(call(*args, **kwargs), *args, **kwargs)

    @property
    def merges(self) -> bool:
        """Whether the part can go into the weight."""
        return hasattr(self, "merged")

    @property
    def into(self) -> tuple[str, ...]:
        """Names of the layer's own tensors that the part goes into, where the layer has them."""
        return tuple(name for name, method in _MERGED.items() if hasattr(self, method))

    def merged_into(self, name: str, value: Tensor) -> Tensor:
        """Return one of the layer's own tensors with the part in it; one that it does not go into as it is."""
        merged: Tensor = getattr(self, _MERGED[name])(value) if name in self.into else value
        return merged

    def record(self) -> dict[str, Any]:
        """Describe the part for a checkpoint, as plain data."""
        described = {"part": self.kind, "method": self.owner, "name": self.method}
        return {**described, "enabled": self.enabled, "config": self.config()}
