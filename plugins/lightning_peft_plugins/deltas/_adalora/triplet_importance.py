"""How much triplets matter: sensitivity of their numbers, smoothed over steps, times its uncertainty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.weights.shards import spread_as, whole
from lightning_peft_plugins.deltas._shared.triplet_form import TripletForm

PARTS = ("down", "values", "up")


class TripletImportance:
    """Moving averages over the numbers of triplet forms (Zhang et al., AdaLoRA, ICLR 2023, equations 8 to 10).

    Args:
        beta1: Decay of the sensitivity ``|w g|``.
        beta2: Decay of its uncertainty, the distance from that average.

    Attributes:
        sensitivity: Average of each parameter, by the name of the tensor, a dot, and the parameter's name in the form.
        uncertainty: Average distance from it, likewise.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    @torch.no_grad()
    def see(self, forms: Mapping[str, TripletForm], scale: float = 1.0) -> None:
        """Take the gradients of a step in; forms that got none stay as they are.

        Args:
            forms: Forms by the name of their tensor.
            scale: Factor by which the gradients are too large.
        """
        found = {key: value for name, form in forms.items() if form.values.grad is not None for key, value in _of(name, form)}
        if not found:
            return
        averages = [[held.setdefault(key, torch.zeros_like(value)) for key, value in found.items()] for held in self._held]
        gradients: list[Any] = [value.grad for value in found.values()]
        now = torch._foreach_mul(list(found.values()), gradients)
        torch._foreach_abs_(now)
        if scale != 1.0:
            torch._foreach_div_(now, scale)
        torch._foreach_lerp_(averages[0], now, 1 - self.beta1)
        torch._foreach_sub_(now, averages[0])
        torch._foreach_abs_(now)
        torch._foreach_lerp_(averages[1], now, 1 - self.beta2)

    @property
    def _held(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.sensitivity, self.uncertainty

    def averages(self) -> list[dict[str, Tensor]]:
        """Return both averages, whole."""
        return [{key: whole(value) for key, value in held.items()} for held in self._held]

    def of(self, forms: Mapping[str, TripletForm]) -> dict[str, Tensor]:
        """Return the importance of every triplet, in the shape of a form's values: equation 7 with the mean of vectors.

        Zero for forms of which nothing was seen.
        """
        scores, found = {}, {}
        if keys := list(self.sensitivity):
            averages = ([held[key] for key in keys] for held in self._held)
            scores = dict(zip(keys, torch._foreach_mul(*averages), strict=True))
        for name, form in forms.items():
            if f"{name}.values" not in scores:
                found[name] = torch.zeros_like(whole(form.values))
                continue
            down, values, up = (scores[f"{name}.{part}"] for part in PARTS)
            down, values, up = map(whole, (down, values, up))
            found[name] = values + down.flatten(values.ndim).mean(-1) + up.mean(-2)
        return found

    def fits(self, forms: Mapping[str, TripletForm]) -> bool:
        """Whether what was seen is of these forms; also puts it on their device."""
        tensors = {key: value for name, form in forms.items() for key, value in _of(name, form)}
        for held in self._held:
            if any(key not in tensors or value.shape != tensors[key].shape for key, value in held.items()):
                return False
            held.update({key: _like(tensors[key], value) for key, value in held.items()})
        return True

    def clear(self) -> None:
        """Begin anew."""
        self.sensitivity.clear()
        self.uncertainty.clear()


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    placed: Tensor = spread_as(parameter, value.to(parameter.device, parameter.dtype))
    return placed


def _of(name: str, form: TripletForm) -> Iterable[tuple[str, Tensor]]:
    return ((f"{name}.{part}", getattr(form, part)) for part in PARTS)
