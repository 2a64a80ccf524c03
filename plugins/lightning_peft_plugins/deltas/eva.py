"""EVA: LoRA whose first factor reads what varies most in a layer's inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft_plugins.deltas._shared.batch_start import BatchStart
from lightning_peft_plugins.deltas._shared.input_moments import covariance, moments


class EVA(BatchStart):
    """EVA (Paischer et al., 2024): ``A`` begins as the principal components of a layer's inputs, ``B`` as zero.

    The components are those of the training's first batches, found exactly. Every weight has the same rank.

    Args:
        rank: Components, and rank of the product.
        alpha: Numerator of the scale.
        looks: Optimizer steps whose inputs are looked at before the deltas are trained.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Example:
        >>> EVA(rank=4, looks=2).looks
        2
    """

    kind = LowRankForm
    paper = "Paischer et al., Parameter Efficient Fine-tuning via Explained Variance Adaptation, 2024, arXiv 2410.07170"

    def see(self, name: str, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        self.add(name, moments(inputs))

    def begin_with(self, form: Any, weight: Tensor, seen: Tensor, rate: float) -> None:
        vectors = torch.linalg.eigh(covariance(seen)).eigenvectors  # in rising order of their values
        form.down.copy_(vectors.T.flip(0)[: form.rank])
