"""What a method puts on a layer for the time of a training: a map of one of its tensors, or a part beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.compose.lanes import Lane

AttachmentT = TypeVar("AttachmentT", bound="Attachment")


class Attachment(nn.Module):
    """Base of weight maps and layer parts.

    Learnable parameters are ordinary ``nn.Parameter`` attributes. Tensors that must not be averaged by EMA or saved (masks)
    are plain attributes: they follow the module across devices but are no buffers, because averaging buffers turns a mask
    into fractions.

    Attributes:
        kind: Name under which a checkpoint records it.
        lane: Where it stands among others.
        owner: Class name of the method that attached it.
        method: Name of that method, which tells two methods of one class apart.
        enabled: Whether it takes part; saved with it. See :func:`lightning_peft.switch`.
        stays: Whether it stays on the module when runs of other methods end.
        optimizer_overrides: Hyperparameters of the parameter group its own parameters train in, for instance
            ``{"weight_decay": 0.0}``.
        lr_scale: Factor on the learning rate of that group.
        faster: Parameters of it that learn at a multiple of another's rate: ``{"up": ("down", 16.0)}``.
    """

    kind: ClassVar[str]
    lane: ClassVar[Lane]
    owner: str = ""
    method: str = ""
    enabled: bool = True
    stays: bool = False
    optimizer_overrides: ClassVar[dict[str, float]] = {}
    lr_scale: float = 1.0
    faster: Mapping[str, tuple[str, float]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True  # of its own from the start: code that was compiled would notice that a switch puts it there

    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain data, so that a file can be baked without the model's class."""
        return {}

    @property
    def key(self) -> str:
        """Name among those on the same tensor or layer."""
        return f"{self.method or self.owner}:{self.kind}"

    def check_finite(self) -> None:
        """Refuse to go into a weight with what is no finite number.

        Raises:
            MisconfigurationException: A parameter holds such a number.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters()):
            raise MisconfigurationException(
                f"The {self.kind} of {self.owner} holds a number that is not finite, and would take a weight along. Load the "
                f"last checkpoint, or go on without it: lightning_peft.switch(module, {self.method!r}, on=False)."
            )

    def take_precision(self, state: Mapping[str, Any]) -> None:
        """Hold tensors in the precision of a state that is about to be loaded: deltas of a float64 weight are float64.

        Args:
            state: Tensors by name; others in it are passed over.
        """
        for name, own in (*self.named_parameters(), *self.named_buffers()):
            given = state.get(name)
            if isinstance(given, Tensor) and given.dtype != own.dtype and given.is_floating_point() and own.is_floating_point():
                own.data = own.data.to(given.dtype)

    def detached(self) -> None:
        """Let go of whatever else than its layer it holds on to; called when it is taken off."""

    def _apply(self: AttachmentT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttachmentT:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, fn(value))
        return self
