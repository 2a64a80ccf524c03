"""Coordinates of a weight that may be trained instead of others, and what was seen of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.structure.forms import Form, dict_of, fields, tensor, whole


@dataclass
class Candidates:
    """Candidates of one weight.

    Attributes:
        indices: Coordinates in the flattened weight.
        total: Sum of the gradients of each.
        squares: Sum of their squares.
        samples: How many steps were summed.
    """

    indices: Tensor
    total: Tensor
    squares: Tensor
    samples: int

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.indices, self.total, self.squares = (each.to(device) for each in (self.indices, self.total, self.squares))

    def state(self) -> dict[str, Any]:
        """What they are, as plain data."""
        return {"indices": self.indices, "total": self.total, "squares": self.squares, "samples": self.samples}


def summed(candidates: Candidates | None, gradient: Tensor, count: int) -> Candidates:
    """Add the gradient of a step; the first one chooses the candidates, where it is largest.

    Args:
        candidates: What was seen so far.
        gradient: The gradient of the whole weight, flattened.
        count: How many candidates.

    Example:
        >>> first = summed(None, torch.tensor([1.0, -3.0, 2.0]), 2)
        >>> summed(first, torch.tensor([9.0, 1.0, 1.0]), 2).total.tolist()
        [-2.0, 3.0]
    """
    indices = gradient.abs().topk(count).indices.sort().values if candidates is None else candidates.indices
    seen = gradient[indices]
    seen = seen.to(torch.promote_types(seen.dtype, torch.float32))
    if candidates is None:
        return Candidates(indices, seen, seen.square(), 1)
    return Candidates(indices, candidates.total + seen, candidates.squares + seen.square(), candidates.samples + 1)


def candidates_form(tensors: Mapping[str, Tensor] | None) -> Form:
    """Say what the candidates of a file look like: coordinates that are in their weights, and as many sums.

    Args:
        tensors: The module's tensors by plain name; ``None`` when it is not at hand.
    """

    def check(value: Any, place: str) -> str | None:
        form = dict_of(fields({"indices": _coordinates, "total": tensor(), "squares": tensor(), "samples": whole(1)}), tensors)
        if (found := form(value, place)) is not None:
            return found
        for name, item in value.items():
            size = None if tensors is None else tensors[name].numel()
            if size is not None and len(item["indices"]) and int(item["indices"].max()) >= size:
                return f"{place}[{name!r}] has coordinates outside of the weight"
            if not len(item["indices"]) == len(item["total"]) == len(item["squares"]):
                return f"{place}[{name!r}] has not as many sums as coordinates"
        return None

    return check


def _coordinates(value: Any, place: str) -> str | None:
    fits = isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 1 and not bool((value < 0).any())
    return None if fits else f"{place} is no list of coordinates"
