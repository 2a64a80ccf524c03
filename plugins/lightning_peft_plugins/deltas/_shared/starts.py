"""First values of low-rank products that are found in the frozen weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from lightning_peft.deltas.low_rank_form import LowRankForm

Start = Callable[[LowRankForm, Tensor, Generator], None]


def lora(form: LowRankForm, weight: Tensor, generator: Generator) -> None:
    """``A`` from a random distribution, ``B`` zero (Hu et al., LoRA, section 4.1)."""
    form.reset(weight, generator)


def pissa(form: LowRankForm, weight: Tensor, generator: Generator) -> None:
    """The first singular directions of the weight, their values shared evenly (Meng et al., PiSSA, NeurIPS 2024, section 3)."""
    form.reset(weight, generator)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[..., : form.rank] / form.scale).sqrt()
    form.start_as(root.unsqueeze(-1) * right[..., : form.rank, :], left[..., : form.rank] * root.unsqueeze(-2))


def olora(form: LowRankForm, weight: Tensor, generator: Generator) -> None:
    """The first rows and columns of a QR decomposition of the weight (Büyükakyüz, OLoRA, 2024)."""
    form.reset(weight, generator)
    left, right = torch.linalg.qr(weight)
    form.start_as(right[..., : form.rank, :], left[..., : form.rank])


STARTS: dict[str, Start] = {"lora": lora, "pissa": pissa, "olora": olora}
