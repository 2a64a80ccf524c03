"""LoRA-XS: a small square matrix between singular vectors of a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.core_form import CoreForm
from lightning_peft_plugins.deltas._shared.scaled_delta import ScaledDelta

SPREAD = 1e-5


class LoRAXS(ScaledDelta):
    """LoRA-XS (Bałazy et al., 2024): trains ``R`` in ``W + scale B R A``, with ``B A`` the principal part of ``W``, frozen.

    Args:
        rank: Rows and columns of ``R``.
        alpha: Numerator of the scale.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Example:
        >>> LoRAXS(rank=16).scale
        1.0
    """

    slots = Slots(form=("core",), init=("lora-xs",))
    kind = CoreForm
    paper = "Bałazy et al., LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, 2024, arXiv 2405.17604"

    def __init__(self, rank: int = 16, alpha: float | None = None, **kwargs: Any) -> None:
        super().__init__(rank, alpha, **kwargs)

    def begin(self, form: Any, weight: Tensor, generator: Generator) -> None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        rank = form.rank
        core = torch.empty_like(form.core, device="cpu").normal_(0, SPREAD, generator=generator)
        form.start_as(values[..., :rank].unsqueeze(-1) * right[..., :rank, :], core, left[..., :rank])
