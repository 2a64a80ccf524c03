"""A weight map: one function between the tensor an optimizer stores and the weight a layer uses."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_peft.weights.attachment import Attachment


class WeightMap(Attachment):
    """One function on one stored tensor; subclasses define :meth:`forward` and, when they need one, ``right_inverse``.

    What it may hold, and the attributes of its class, are those of :class:`~lightning_peft.weights.attachment.Attachment`; its
    ``lane`` says where it stands on its tensor.

    Attributes:
        as_baked: Whether layers are given what :meth:`bake` returns: while what would be shipped is validated.
        sized_by_file: Parameters whose size follows from the weight's values, so that a file may hold them in another. The map
            takes that size when it is loaded, and refuses one that cannot be.
    """

    as_baked: bool = False
    sized_by_file: ClassVar[frozenset[str]] = frozenset()

    def splits(self, weight: Tensor) -> bool:
        """Whether the map can act on a weight whose parts are computed with by several processes; else it sees it whole.

        Such a weight is a tensor of the whole shape, see :func:`~lightning_peft.weights.shards.by_parts`.
        """
        return False

    def forward(self, weight: Tensor) -> Tensor:
        """Map the value coming from the lane below to the value for the lane above; same shape and dtype."""
        raise NotImplementedError

    def bake(self, weight: Tensor) -> Tensor:
        """Map a value for good; differs from :meth:`forward` only where training sees something softer."""
        return self.forward(weight)

    def record(self) -> dict[str, Any]:
        """Describe the map for a checkpoint, as plain data."""
        described = {"map": self.kind, "method": self.owner, "name": self.method}
        return {**described, "enabled": self.enabled, "config": self.config()}
