"""Deltas with a scale before them."""

from __future__ import annotations

from typing import Any, Literal

from lightning_peft.arguments import one_of, positive
from lightning_peft.deltas.sides import Place
from lightning_peft_plugins.deltas._shared.delta_method import DeltaMethod


class ScaledDelta(DeltaMethod):
    """A delta that is multiplied by ``alpha`` over its rank, or over the root of it.

    Args:
        rank: Rank of the deltas.
        alpha: Numerator of the scale; the rank by default, so that the scale is 1.
        scaling: What it is divided by: ``"rank"``, or ``"root"`` of the rank (Kalajdzievski, rsLoRA, 2023, arXiv 2312.03732).
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Raises:
        MisconfigurationException: A scale that is not positive; see :class:`DeltaMethod` for the rest.
    """

    def __init__(
        self, rank: int = 8, alpha: float | None = None, scaling: Literal["rank", "root"] = "rank", **kwargs: Any
    ) -> None:
        super().__init__(rank, **kwargs)
        positive("alpha", rank if alpha is None else alpha, "The delta is multiplied by it. Leave it out for a factor of 1.")
        one_of("scaling", scaling, ("rank", "root"))
        self.alpha, self.scaling = rank if alpha is None else alpha, scaling

    @property
    def scale(self) -> float:
        """Factor of the delta."""
        return self.alpha / (self.rank if self.scaling == "rank" else self.rank**0.5)

    def arguments(self, place: Place) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale}
