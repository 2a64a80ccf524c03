"""LoLDU: the diagonal between the triangles of a weight."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Generator, Tensor

from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.delta_method import DeltaMethod
from lightning_peft_plugins.deltas._shared.diagonal_form import DiagonalForm


class LoLDU(DeltaMethod):
    """LoLDU (Shi et al., 2024): ``W = P L D U``; trains the first entries of ``D`` and one factor of all.

    Args:
        rank: Entries of ``D`` to train; the triangles are frozen, so many cost little.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Raises:
        MisconfigurationException: Also where a weight has a pivot of zero, to rounding, by which a row would be divided.

    Example:
        >>> LoLDU(rank=32)
        LoLDU(rank=32, dropout=0.0, ...)
    """

    slots = Slots(form=("loldu",), init=())
    kind = DiagonalForm
    paper = "Shi et al., LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition, 2024, arXiv 2410.13618"

    def __init__(self, rank: int = 64, **kwargs: Any) -> None:
        super().__init__(rank, **kwargs)

    def arguments(self, place: Place) -> dict[str, Any]:
        return {"rank": self.rank, "gained": True}

    def begin(self, form: Any, weight: Tensor, generator: Generator) -> None:
        permutation, lower, upper = torch.linalg.lu(weight)
        pivots = upper.diagonal(dim1=-2, dim2=-1)[..., : form.rank]
        rounding = max(weight.shape[-2:]) * torch.finfo(upper.dtype).eps * upper.abs().amax((-2, -1)).unsqueeze(-1)
        if bool((pivots.abs() <= rounding).any()):  # as a filter that is dead has in a pretrained network
            raise MisconfigurationException(
                f"a weight of shape {tuple(form.layout.shape)} has a pivot of zero among its first {form.rank}, to rounding, "
                "and LoLDU divides by it. Give a smaller rank=, or leave such layers out with exclude=; SVFit takes any weight."
            )
        form.start_as(upper[..., : form.rank, :] / pivots.unsqueeze(-1), pivots, permutation @ lower[..., : form.rank])
