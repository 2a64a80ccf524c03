"""LoRA-SB: a small square between the singular vectors of a first step of full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.batch_start import BatchStart
from lightning_peft_plugins.deltas._shared.core_form import CoreForm
from lightning_peft_plugins.deltas._shared.input_rows import has_rows, input_rows, outputs_last


class LoRASB(BatchStart):
    """LoRA-SB (Ponkshe et al., 2024): trains ``R`` in ``W + B R A``, which begins as the best approximation of a first step.

    The step is ``-lr sign(G)``, with ``G`` the gradient of the whole weight over the training's first batches. So the network
    changes when the deltas begin, by that step's principal part.

    Args:
        rank: Rows and columns of ``R``.
        alpha: Numerator of the scale.
        looks: Optimizer steps whose gradients are looked at before the deltas are trained.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Raises:
        MisconfigurationException: Also for layers whose gradient is not found: grouped convolutions, projections whose layer
            is not called.

    Example:
        >>> LoRASB(rank=32).scale
        1.0
    """

    slots = Slots(form=("core",), init=("lora-sb",))
    kind = CoreForm
    paper = "Ponkshe et al., Initialization using Update Approximation is a Silver Bullet, 2024, arXiv 2411.19557"

    def __init__(self, rank: int = 32, alpha: float | None = None, looks: int = 8, **kwargs: Any) -> None:
        super().__init__(rank, alpha, looks, **kwargs)

    def _check(self, found: Sequence[Place]) -> None:
        super()._check(found)
        if others := [place.path for place in found if not self.watches(place)]:
            raise MisconfigurationException(
                f"{self.name} finds a core for linear layers and convolutions of one group that are called, and {others[0]} is "
                f"none of these, nor are {len(others) - 1} others. Leave them out: exclude={others[:8]}. "
                "LoRAXS takes any weight."
            )

    @staticmethod
    def watches(place: Place) -> bool:
        """Convolutions too: without a first core nothing would be trained there."""
        return place.called and has_rows(place.layer)

    def _watch(self, layers: Mapping[str, nn.Module]) -> None:
        self._calls.open_gradients(layers, self.see, self.in_training_step)

    @torch.no_grad()
    def see(self, name: str, layer: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        rows = input_rows(layer, inputs).flatten(0, -2)
        self.add(name, outputs_last(layer, gradient).flatten(0, -2).T.to(dtype) @ rows.to(dtype))

    def begin_with(self, form: Any, weight: Tensor, seen: Tensor, rate: float) -> None:
        left, values, right = torch.linalg.svd(-rate * seen.sign(), full_matrices=False)
        rank = form.rank
        form.start_as(right[:rank], torch.diag(values[:rank]) / form.scale, left[:, :rank])
