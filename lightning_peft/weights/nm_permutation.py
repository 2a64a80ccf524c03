"""Orders of columns in which an N:M pattern keeps more magnitude: channel permutations, searched stripe by stripe."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.weights.nm_pattern import check_pattern

# Up to this M all ways to share the columns of two stripes are tried (35 at M = 4); above, all swaps of two.
_WHOLE_WINDOWS = 4
_CHUNK = 2**15  # windows times rows looked at together, so that they stay in the processor's cache
_LEAST = 1e-6  # of what a window keeps; less is rounding


def nm_permutation(
    matrix: Tensor,
    n: int,
    m: int,
    *,
    escapes: int = 100,
    seed: int = 0,
    most: int = 2**28,
    progress: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Search an order of the columns in which N:M keeps more magnitude (Pool & Yu, NeurIPS 2021).

    Stripes are M consecutive columns. All ways to share the columns of two stripes are tried (for M above 4 only swaps of one
    column each) and the best is taken, for all pairs of stripes again and again until none keeps more. Then ``escapes`` times
    two columns are swapped at random and the search goes on from there; what keeps less is taken back. The pairs of one round
    are disjoint, so that they are looked at together; NVIDIA's code takes the best pair of all first. Nothing depends on a
    clock: the same matrix and seed give the same order on every rank and after a resume.

    Args:
        matrix: Shape ``(rows, columns)``; magnitudes count. Columns behind the last whole stripe stay where they are.
        n: Weights kept per group.
        m: Group size.
        escapes: Random swaps after the search has come to its end.
        seed: Of these swaps.
        most: Bound of the work: windows of two stripes times rows.
        progress: Called with the work done and the magnitude kept so far.

    Returns:
        Old column of every new one, shape ``(columns,)``: ``matrix[:, order]`` never keeps less than ``matrix``.

    Raises:
        MisconfigurationException: An impossible pattern, or ``matrix`` is no matrix.

    Example:
        >>> matrix = torch.tensor([[4.0, 4.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0]])
        >>> order = nm_permutation(matrix, 2, 4)
        >>> kept_magnitude(matrix, 2, 4), kept_magnitude(matrix[:, order], 2, 4)
        (10.0, 16.0)
    """
    check_pattern(n, m)
    if matrix.ndim != 2:
        raise MisconfigurationException(
            f"nm_permutation orders the columns of a matrix, got shape {tuple(matrix.shape)}. Flatten what is not an input: "
            "weight.movedim(input_dim, -1).flatten(0, -2)."
        )
    order = torch.arange(matrix.shape[1])
    if n == m or matrix.shape[1] < 2 * m or not len(matrix):
        return order
    with torch.no_grad():
        search = _Search(matrix, n, m, most, progress)
        search.settle()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(escapes):
            if search.work >= most:
                break
            search.escape(generator)
    order[: len(search.order)] = search.order
    return order


def kept_magnitude(weight: Tensor, n: int, m: int, dim: int = -1) -> float:
    """Sum of the magnitudes that N:M keeps along a dimension; an incomplete last group stays dense.

    Example:
        >>> kept_magnitude(torch.tensor([[1.0, -4.0, 3.0, 2.0, 9.0]]), 2, 4)
        16.0
    """
    check_pattern(n, m)
    moved = weight.detach().abs().movedim(dim, -1)
    whole = moved.shape[-1] - moved.shape[-1] % m
    kept = moved[..., :whole].reshape(*moved.shape[:-1], whole // m, m).topk(n, -1).values if whole else moved[..., :0]
    return float(kept.sum(dtype=torch.float64) + moved[..., whole:].sum(dtype=torch.float64))


@dataclass(frozen=True)
class _Shares:
    """Ways to share the columns of two stripes.

    Attributes:
        subsets: Columns of one stripe, each set once.
        ways: Left and right subset of every way; the first is the one there is.
        columns: The same as columns of the window, shape ``(ways, 2 m)``.
    """

    subsets: list[tuple[int, ...]]
    ways: Tensor
    columns: Tensor


def _shares(m: int) -> _Shares:
    own = tuple(range(m))
    if m <= _WHOLE_WINDOWS:  # the first column may stay: stripes have no order
        lefts = [(0, *rest) for rest in itertools.combinations(range(1, 2 * m), m - 1)]
    else:
        swapped = itertools.product(range(m), range(m, 2 * m))
        lefts = [own, *(tuple(sorted({*own} - {out} | {new})) for out, new in swapped)]
    pairs = [(left, tuple(column for column in range(2 * m) if column not in left)) for left in lefts]
    subsets = sorted({subset for pair in pairs for subset in pair})
    place = {subset: index for index, subset in enumerate(subsets)}
    ways = torch.tensor([[place[left], place[right]] for left, right in pairs])
    return _Shares(subsets, ways, torch.tensor([[*left, *right] for left, right in pairs]))


class _Search:
    """The state of a search.

    Args:
        matrix: Shape ``(rows, columns)``.
        n: Weights kept per group.
        m: Group size.
        most: Bound of the work.
        progress: Called after every round.

    Attributes:
        order: Old column of every new one, whole stripes only.
        work: Windows looked at, times rows.
    """

    def __init__(self, matrix: Tensor, n: int, m: int, most: int, progress: Callable[[int, float], None] | None) -> None:
        self.n, self.m, self.most, self.progress = n, m, most, progress
        self.stripes = matrix.shape[1] // m
        magnitude = matrix[:, : self.stripes * m].abs()
        self.columns = (magnitude if magnitude.dtype == torch.float64 else magnitude.float()).T.contiguous()
        self.order = torch.arange(self.stripes * m)
        self.shares = _shares(m)
        self.settled = torch.eye(self.stripes, dtype=torch.bool)  # pairs of stripes that were looked at and have not changed
        self.work = 0
        self.kept = kept_magnitude(self.columns.T, n, m)

    def settle(self) -> None:
        """Share columns anew until no pair of stripes keeps more another way."""
        while self.work < self.most:
            left, right = (~self.settled).triu(1).nonzero(as_tuple=True)
            if not len(left):
                return
            if len(left) <= 4 * self.stripes:
                self._share(left, right)
                continue
            for left, right in _rounds(self.stripes):
                unsettled = ~self.settled[left, right]
                if unsettled.any() and self.work < self.most:
                    self._share(left[unsettled], right[unsettled])

    def escape(self, generator: torch.Generator) -> None:
        """Swap two columns at random and settle; go back if that keeps less."""
        before = self.order.clone(), self.settled.clone(), self.kept
        one, other = torch.randperm(self.stripes, generator=generator)[:2].tolist()
        first, second = (stripe * self.m + int(torch.randint(self.m, (), generator=generator)) for stripe in (one, other))
        swapped = self.order.clone()
        swapped[[first, second]] = self.order[[second, first]]
        self.kept += float(self._kept(swapped, [one, other]) - self._kept(self.order, [one, other]))
        self.order = swapped
        self._unsettle(torch.tensor([one, other]))
        self.settled[one, other] = self.settled[other, one] = True  # which would only take the swap back
        self.settle()
        if self.kept <= before[2] * (1 + _LEAST):
            self.order, self.settled, self.kept = before

    def _kept(self, order: Tensor, stripes: Sequence[int]) -> Tensor:
        columns = self.columns[order.view(self.stripes, self.m)[list(stripes)]]
        return columns.topk(self.n, 1).values.sum(dtype=torch.float64)

    def _unsettle(self, stripes: Tensor) -> None:
        self.settled[stripes, :] = False
        self.settled[:, stripes] = False
        self.settled[stripes, stripes] = True

    def _share(self, left: Tensor, right: Tensor) -> None:
        """Take the best ways to share the columns of pairs of stripes, each stripe once."""
        view, rows = self.order.view(self.stripes, self.m), self.columns.shape[1]
        windows = torch.cat((view[left], view[right]), dim=1)
        parts = torch.split(windows, max(1, _CHUNK // rows))
        kept = torch.cat([self._kept_by_subset(part) for part in parts])[:, self.shares.ways].sum(-1)
        self.work += len(windows) * rows
        best, way = kept.max(1)
        gain = torch.where(best > kept[:, 0] * (1 + _LEAST), best - kept[:, 0], 0.0)
        self.settled[left, right] = self.settled[right, left] = True
        better = _disjoint(left, right, gain)
        new = windows[better].gather(1, self.shares.columns[way[better]])
        view[left[better]], view[right[better]] = new[:, : self.m], new[:, self.m :]
        open_ = gain > 0
        open_[better] = False  # these had to wait for a better one with one of their stripes
        self.settled[left[open_], right[open_]] = self.settled[right[open_], left[open_]] = False
        self._unsettle(torch.cat((left[better], right[better])))
        if self.m <= _WHOLE_WINDOWS:  # there is no better way left for these
            self.settled[left[better], right[better]] = self.settled[right[better], left[better]] = True
        self.kept += float(gain[better].sum())
        if self.progress is not None:
            self.progress(self.work, self.kept)

    def _kept_by_subset(self, windows: Tensor) -> Tensor:
        """Magnitude that each subset of a window's columns keeps, shape ``(windows, subsets)``, float64 on the CPU."""
        columns = self.columns[windows.T.to(self.columns.device)]  # (2 m, windows, rows)
        if (self.n, self.m) == (2, 4):
            kept = _two_of_four(columns, self.shares.subsets)
        else:
            found = [columns[list(subset)].topk(self.n, 0).values.sum((0, 2)) for subset in self.shares.subsets]
            kept = torch.stack(found, dim=1)
        return kept.double().cpu()


def _two_of_four(columns: Tensor, subsets: Sequence[Sequence[int]]) -> Tensor:
    """Sum over rows of the two largest of four columns: ``(windows, subsets)`` from ``(columns, windows, rows)``.

    The two largest of four are one pair, the other pair, or the larger of each; sums and maxima of pairs are made once.
    """
    pairs = list(itertools.combinations(range(len(columns)), 2))
    sums = {(i, j): columns[i] + columns[j] for i, j in pairs}
    larger = {(i, j): torch.maximum(columns[i], columns[j]) for i, j in pairs}
    one, other, found = torch.empty_like(columns[0]), torch.empty_like(columns[0]), []
    for a, b, c, d in subsets:
        torch.maximum(sums[a, b], sums[c, d], out=one)
        torch.add(larger[a, b], larger[c, d], out=other)
        found.append(torch.maximum(one, other, out=one).sum(1))
    return torch.stack(found, dim=1)


def _disjoint(left: Tensor, right: Tensor, gain: Tensor) -> Tensor:
    """Places of the pairs with a gain, the best first, none with a stripe of a better one."""
    used: set[int] = set()
    found = []
    for place in gain.argsort(descending=True, stable=True)[: int((gain > 0).sum())].tolist():
        pair = {int(left[place]), int(right[place])}
        if used.isdisjoint(pair):
            used |= pair
            found.append(place)
    return torch.tensor(found, dtype=torch.long)


def _rounds(stripes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of stripes in rounds of disjoint ones, as in a tournament where everybody meets everybody once."""
    players = stripes + stripes % 2
    ring = torch.arange(players)
    for _ in range(players - 1):
        left, right = ring[: players // 2], ring[players // 2 :].flip(0)
        real = (left < stripes) & (right < stripes)
        yield left[real], right[real]
        ring = torch.cat((ring[:1], ring[1:].roll(1)))
