"""Float32 in the place of half-precision parameters, for an optimizer to step on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)


class FineParameters:
    """Holds a copy in float32 of every half-precision parameter; others are stepped on as they are.

    In float16 the 1e-8 that Adam adds to its denominator is 0, and so is the square of a small gradient: its step is 0 / 0. In
    both half precisions steps of less than a thousandth of a weight are lost.

    Args:
        parameters: What moves.

    Attributes:
        stepped_on: What the optimizer is given, in the same order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.stepped_on = [nn.Parameter(p.detach().float()) if p.dtype in HALF else p for p in parameters]
        pairs = zip(parameters, self.stepped_on, strict=True)
        self._pairs = [(coarse, fine) for coarse, fine in pairs if coarse is not fine]

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Take over gradients, and values that somebody else wrote since the last step."""
        for coarse, fine in self._pairs:
            fine.copy_(torch.where(fine.to(coarse.dtype) == coarse, fine, coarse.float()))
            fine.grad = None if coarse.grad is None else coarse.grad.float()

    @torch.no_grad()
    def give_values(self) -> None:
        """Write the values after a step into the parameters, rounded."""
        for coarse, fine in self._pairs:
            coarse.copy_(fine)
