"""CorDA: LoRA that trains the part of a weight that matters most, or least, for a layer's inputs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.arguments import one_of
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.batch_start import BatchStart
from lightning_peft_plugins.deltas._shared.input_moments import moments
from lightning_peft_plugins.deltas._shared.products import PRODUCTS

_DAMPING, _CLOSE = 0.01, 0.05


class CorDA(BatchStart):
    """CorDA (Yang et al., NeurIPS 2024): the product begins as a part of ``W`` by the singular values of ``W C``.

    ``C`` is the second moment of the layer's inputs in the training's first batches.

    Args:
        rank: Singular directions to train.
        alpha: Numerator of the scale.
        looks: Optimizer steps whose inputs are looked at before the deltas are trained.
        directions: ``"first"`` trains what the inputs use most (the paper's instruction-previewed mode), for the task they come
            from; ``"last"`` what they use least, so that what they know is preserved (its knowledge-preserved mode).
        form: What is added to a weight: ``"lora"``, a product, or ``"dora"``, which learns the lengths of rows apart.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Example:
        >>> CorDA(rank=4, directions="last").directions
        'last'
    """

    slots = Slots(form=tuple(PRODUCTS), init=("corda",))
    paper = "Yang et al., CorDA: Context-Oriented Decomposition Adaptation of LLMs, NeurIPS 2024, arXiv 2406.05223"

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        looks: int = 8,
        directions: Literal["first", "last"] = "first",
        form: Literal["lora", "dora"] = "lora",
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, alpha, looks, **kwargs)
        one_of("directions", directions, ("first", "last"))
        one_of("form", form, PRODUCTS)
        self.directions = directions
        self.form, self.kind = form, PRODUCTS[form]

    def arguments(self, place: Place) -> dict[str, Any]:
        return super().arguments(place) | {"taken": self.rank}

    def see(self, name: str, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        self.add(name, moments(inputs))

    def begin_with(self, form: Any, weight: Tensor, seen: Tensor, rate: float) -> None:
        second = seen[:-1, :-1]
        damped, inverse = _inverted(second / second.diagonal().mean().clamp_min(torch.finfo(seen.dtype).tiny))
        left, values, right = torch.linalg.svd(weight @ damped, full_matrices=False)
        right = right @ inverse
        part = slice(form.rank) if self.directions == "first" else slice(len(values) - form.rank, None)
        root = (values[part] / form.scale).sqrt()
        form.start_as(root.unsqueeze(1) * right[part], left[:, part] * root)


def _inverted(second: Tensor) -> tuple[Tensor, Tensor]:
    """Moments with as much added to their diagonal as it takes to invert them, and the inverse."""
    eye = torch.eye(len(second), dtype=second.dtype, device=second.device)
    share = _DAMPING
    while True:
        damped = second + share * second.diagonal().mean() * eye
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < _CLOSE:
            return damped, inverse
        share *= 2
