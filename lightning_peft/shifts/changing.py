"""Shifts that change all the time at one difficulty: walks between pairs of them (CCC; Press et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.arguments import positive
from lightning_peft.shifts.data import Part
from lightning_peft.shifts.streams import Episode, closed
from lightning_peft.shifts.twice import under

LEVELS = 6  # no shift at all, and five severities


def find_walk(accuracy: Tensor, target: float) -> list[tuple[int, int]]:
    """Find a walk from one shift to another on which a baseline's mean accuracy is near a target.

    It begins with the first shift alone, ends with the second alone, and every step lowers the severity of the first by one
    or raises that of the second. From each place it goes on to whichever neighbour brings the mean of the rest nearer to the
    target, and it begins at the severity from which the mean is nearest, as the official code does: not the best of all walks.

    Args:
        accuracy: Of the baseline under the first shift at severity ``i`` and the second at ``j``, shape ``(levels, levels)``.
        target: Wanted mean, in the same unit.

    Returns:
        Severities of both, ``(i, j)``.

    Example:
        >>> find_walk(torch.tensor([[0.9, 0.6, 0.4], [0.6, 0.4, 0.2], [0.4, 0.2, 0.1]]), 0.5)
        [(2, 0), (1, 0), (1, 1), (0, 1)]
    """
    rows, columns = accuracy.shape
    value = accuracy.double().tolist()
    rest: dict[tuple[int, int], tuple[float, list[tuple[int, int]]]] = {}
    for j in range(columns):
        rest[0, j] = (value[0][j], [(0, j)])

    def miss(total: float, length: int) -> float:
        return abs(total / length - target)

    for i in range(1, rows):
        for j in reversed(range(columns)):
            ways = [rest[place] for place in ((i, j + 1), (i - 1, j)) if place in rest]  # of equal ones the first
            total, walk = min(ways, key=lambda way: miss(way[0] + value[i][j], len(way[1]) + 1))
            rest[i, j] = (total + value[i][j], [(i, j), *walk])
    return min((rest[i, 0] for i in range(1, rows)), key=lambda way: miss(way[0], len(way[1])))[1]


def changing_episode(
    shifts: Sequence[str],
    accuracy: Callable[[Part], float],
    *,
    target: float,
    images: int,
    total: int,
    speed: int = 1000,
    seed: int = 0,
    clean: int = 0,
) -> Episode:
    """Lay out a stream that walks from shift to shift, at one difficulty for a baseline.

    Two shifts are drawn, and the walk between them (:func:`find_walk`) is followed, with ``speed`` images at every step; then
    a third is drawn, and the walk leads on from the second to it, until there are ``total`` images. There are no borders:
    batches go across.

    Args:
        shifts: Names of shifts that have severities 1 to 5.
        accuracy: Measures the baseline on a test set; asked once for each of the 36 places of a pair that comes.
        target: Wanted mean accuracy, in the unit of ``accuracy``.
        images: Images in every test set.
        total: Images in the stream.
        speed: Images at one place of a walk: 1000, 2000 and 5000 in the paper.
        seed: Seed of shifts and images.
        clean: Clean samples at the end.

    Raises:
        MisconfigurationException: There are fewer than two shifts, or a number is not positive.
    """
    if len(set(shifts)) < 2:
        raise MisconfigurationException(f"A walk needs two shifts at least, and there are {len(set(shifts))}: {list(shifts)}.")
    for name, number in (("images", images), ("total", total), ("speed", speed)):
        positive(name, number)
    draw = torch.Generator().manual_seed(seed)
    places: dict[Part, int] = {}
    rows: list[Tensor] = []
    left = total
    for part in _walks(shifts, accuracy, target, draw):
        count = min(speed, left)
        samples = torch.cat([torch.randperm(images, generator=draw) for _ in range(-(-count // images))])[:count]
        rows.append(torch.stack([torch.full_like(samples, places.setdefault(part, len(places))), samples], 1))
        left -= count
        if not left:
            break
    end = torch.randperm(images, generator=draw)[:clean]
    return closed("all", tuple(places), [torch.cat(rows)], end)


def _walks(shifts: Sequence[str], accuracy: Callable[[Part], float], target: float, draw: torch.Generator) -> Iterator[Part]:
    """The test sets of one walk after the other, without an end."""
    known: dict[tuple[str, str], list[tuple[int, int]]] = {}
    measured: dict[Part, float] = {}

    def measure(part: Part) -> float:
        if part not in measured:
            measured[part] = float(accuracy(part))
        return measured[part]

    first = _other(shifts, None, draw)
    while True:
        second = _other(shifts, first, draw)
        if (first, second) not in known:
            grid = [[measure(under(first, i, second, j)) for j in range(LEVELS)] for i in range(LEVELS)]
            known[first, second] = find_walk(torch.tensor(grid, dtype=torch.float64), target)
        for i, j in known[first, second]:
            yield under(first, i, second, j)
        first = second


def _other(shifts: Sequence[str], than: str | None, draw: torch.Generator) -> str:
    left = [shift for shift in dict.fromkeys(shifts) if shift != than]
    return left[int(torch.randint(len(left), (), generator=draw))]
