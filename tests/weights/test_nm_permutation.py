"""The search for an order of columns, against all orders, all swaps, and the figures of NVIDIA's code."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.functional import nm_mask
from lightning_peft.weights.nm_permutation import kept_magnitude, nm_permutation


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator)


def is_order(order: Tensor) -> bool:
    return order.sort().values.tolist() == list(range(len(order)))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 3), (1, 2)])
def test_of_two_stripes_the_best_of_all_orders_is_found(n: int, m: int) -> None:
    matrix = drawn(5, 2 * m)
    best = max(
        kept_magnitude(matrix[:, [*left, *(column for column in range(2 * m) if column not in left)]], n, m)
        for left in itertools.combinations(range(2 * m), m)
    )
    order = nm_permutation(matrix, n, m, escapes=0)
    assert is_order(order)
    assert kept_magnitude(matrix[:, order], n, m) == pytest.approx(best, rel=1e-6)


def test_what_magnitude_is_kept_is_what_the_mask_keeps() -> None:
    weight = drawn(7, 22).view(7, 11, 2)
    for n, m in ((2, 4), (1, 3)):
        kept = float((weight.abs() * nm_mask(weight, n, m, 1)).sum())
        assert kept_magnitude(weight, n, m, 1) == pytest.approx(kept, rel=1e-6)
    assert kept_magnitude(weight[:, :3], 2, 4, 1) == pytest.approx(float(weight[:, :3].abs().sum()), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 20), (4, 8, 24)])
def test_no_swap_of_two_columns_keeps_more_in_the_end(n: int, m: int, columns: int) -> None:
    matrix = drawn(6, columns)
    order = nm_permutation(matrix, n, m, escapes=0)
    kept = kept_magnitude(matrix[:, order], n, m)
    assert is_order(order)
    assert kept > kept_magnitude(matrix, n, m)
    for one, other in itertools.combinations(range(columns), 2):
        swapped = order.clone()
        swapped[[one, other]] = order[[other, one]]
        assert kept_magnitude(matrix[:, swapped], n, m) <= kept * (1 + 1e-5)


# apex.contrib.sparsity.permutation_search_kernels.exhaustive_search.Exhaustive_Search(matrix, 8, 100), on the CPU.
@pytest.mark.parametrize(("rows", "columns", "seed", "theirs"), [(8, 32, 0, 9695.0), (32, 48, 1, 56672.0)])
def test_it_keeps_what_the_official_search_keeps(rows: int, columns: int, seed: int, theirs: float) -> None:
    matrix = torch.from_numpy(_integers(rows, columns, seed))
    assert kept_magnitude(matrix[:, nm_permutation(matrix, 2, 4, escapes=10)], 2, 4) >= theirs


def _integers(rows: int, columns: int, seed: int):
    import numpy

    row, column = numpy.mgrid[:rows, :columns]
    return (((row * 31 + column * 17 + seed) ** 2 * 7 + row * column) % 101).astype(numpy.float32)


def test_escapes_keep_no_less_and_it_is_the_same_every_time() -> None:
    matrix = drawn(8, 40)
    kept = [kept_magnitude(matrix[:, nm_permutation(matrix, 2, 4, escapes=escapes)], 2, 4) for escapes in (0, 40, 40)]
    assert kept[0] < kept[1] == kept[2]


def test_the_work_is_bounded_and_reported() -> None:
    matrix, seen = drawn(4, 64), []
    assert nm_permutation(matrix, 2, 4, most=0).tolist() == list(range(64))
    order = nm_permutation(matrix, 2, 4, most=100, progress=lambda work, kept: seen.append((work, kept)))
    assert seen[-1][0] < 100 + 8 * 4  # one round of eight windows of four rows at most beyond
    assert seen[-1][1] == pytest.approx(kept_magnitude(matrix[:, order], 2, 4), rel=1e-5)


def test_columns_behind_the_last_stripe_stay() -> None:
    order = nm_permutation(drawn(4, 18), 2, 4, escapes=5)
    assert is_order(order[:16])
    assert order[16:].tolist() == [16, 17]
    assert nm_permutation(drawn(4, 7), 2, 4).tolist() == list(range(7))


def test_what_is_no_matrix_is_refused() -> None:
    weight = torch.ones(2, 8, 3)
    with pytest.raises(MisconfigurationException, match=r"weight\.movedim"):
        nm_permutation(weight, 2, 4)
    assert len(nm_permutation(weight.movedim(1, -1).flatten(0, -2), 2, 4)) == 8
