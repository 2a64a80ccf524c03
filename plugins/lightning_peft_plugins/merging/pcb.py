"""PCB-Merging: entries weighted by their own size and by how models compete over them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft import merge_function
from lightning_peft.merging.kth_largest import kth_largest
from lightning_peft.merging.merge_function import Stacks
from lightning_peft_plugins.merging._shared import signs

_CLIPPED = 1e-4  # share of magnitudes that is clipped at either end


def bounds(stacks: Stacks) -> Tensor:
    """Find what magnitudes of differences are clipped to, ``(2, n)``."""

    def magnitudes(place: float, more: int = 0) -> Tensor:
        return kth_largest(lambda: (piece.abs() for piece in stacks()), lambda total: total - max(int(total * place) - more, 0))

    return torch.stack([magnitudes(_CLIPPED), magnitudes(1 - _CLIPPED, more=1)])


def levels(stacks: Stacks, bounds: Tensor, density: float) -> Tensor:
    """Find, for each model, the score that a share of its entries reaches, and the largest, ``(2, n)``."""
    signs.check_density(density)

    def kept(total: int) -> int:
        return total - min(int(total * (1 - density)), total - 1)

    def score(sign: int) -> Stacks:
        return lambda: (scores(piece, bounds).mul_(sign).clamp_(min=0).abs_() for piece in stacks())

    # Of numbers with signs: the k-th largest is positive, or zero, or the negative of one that as many follow.
    floor = kth_largest(score(1), kept)
    if not floor.all():
        floor = floor - kth_largest(score(-1), lambda total: total + 1 - kept(total))
    largest = torch.stack([scores(piece, bounds).amax(1) for piece in stacks()]).amax(0)
    return torch.stack([floor, largest])


def scores(deltas: Tensor, bounds: Tensor) -> Tensor:
    """Return what entries count for in the competition.

    Args:
        deltas: Differences, ``(n, *shape)``.
        bounds: ``(2, n)``, the range of each model's magnitudes.

    Returns:
        ``(n, *shape)``, below zero where a difference goes against the sum.
    """
    low, high = bounds.to(deltas.dtype).view(2, -1, *[1] * (deltas.dim() - 1))
    spread = torch.where(high > low, high - low, 1.0)
    own = deltas.abs().clamp(low, high).sub_(low).div_(spread).square_()
    # A factor of exp(-n) drops out where scores become weights, and without it many models would overflow.
    return own.sub_(1).mul_(len(deltas)).exp_().mul_(torch.tanh(deltas * deltas.sum(0)))


@merge_function(elementwise=True, surveys={"bounds": bounds, "levels": levels})
def pcb(deltas: Tensor, bounds: Tensor, levels: Tensor, *, density: float = 0.1) -> Tensor:
    """Merge by parameter competition balancing (Du et al., NeurIPS 2024, https://arxiv.org/abs/2410.02396, section 3).

    Args:
        deltas: Differences to the base, ``(n, *shape)``.
        bounds: ``(2, n)``, what magnitudes are clipped to.
        levels: ``(2, n)``, the score of each model below which an entry is dropped, and its largest.
        density: Share of each model's entries that stays.

    Returns:
        The merged difference, ``(*shape)``.

    Example:
        >>> deltas = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, -4.0]])
        >>> bounds = torch.tensor([[1.0, 1.0], [3.0, 4.0]])
        >>> pcb(deltas, bounds, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor([ 2.7617,  1.5565, -4.0000])
    """
    column = (2, -1, *[1] * (deltas.dim() - 1))
    (low, high), (floor, largest) = (each.to(deltas.dtype).view(column) for each in (bounds, levels))
    score = scores(deltas, bounds)
    # Where all that stay have one score, they count the same.
    weight = torch.where(largest > floor, (score.maximum(floor) - floor) / (largest - floor), (score >= floor) & (score > 0))
    clipped = deltas.abs().clamp(low, high) * deltas.sign()
    return (clipped * weight).sum(0).div_(weight.sum(0).clamp_(min=1e-12))
