"""Masks along both sides, against every mask there is and the bound of the approximation."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.functional import is_nm, nm_mask
from lightning_peft.weights.nm_transposable import patterns_of_block, transposable_nm_mask


def brute_force(block: Tensor, n: int) -> float:
    """The most that a mask with at most n entries in every row and column keeps, over all 2^16 masks of a block of 4."""
    bits = (torch.arange(2**16)[:, None] >> torch.arange(16)) & 1
    masks = bits.view(-1, 4, 4)
    allowed = (masks.sum(1) <= n).all(1) & (masks.sum(2) <= n).all(1)
    return float((masks[allowed] * block.abs()).sum((1, 2)).max())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_mask_keeps_more(n: int) -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(n))
    mask = transposable_nm_mask(weight, n, 4)
    assert is_nm(mask.float(), n, 4, 0)
    assert is_nm(mask.float(), n, 4, 1)
    for i, j in itertools.product(range(2), range(3)):
        block = (slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
        assert float((weight.abs() * mask)[block].sum()) == pytest.approx(brute_force(weight[block], n), rel=1e-6)


def test_a_block_by_hand() -> None:
    # The largest of each row alone would take columns 0 and 1 three times. One row must give them up: the one that loses least.
    weight = torch.tensor([[9.0, 8, 1, 1], [9, 8, 1, 1], [9, 5, 2, 2], [1, 1, 2, 2]])
    wanted = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]  # 38 + 8 - 4 = 42; any other keeps less
    for turned in (False, True):
        found = transposable_nm_mask(weight.T if turned else weight, 2, 4)
        assert (found.T if turned else found).int().tolist() == wanted


def test_there_are_90_patterns_at_2_of_4() -> None:
    assert [len(patterns_of_block(n, m)) for n, m in ((2, 4), (1, 4), (3, 4), (1, 3), (1, 2))] == [90, 24, 24, 6, 2]


def test_above_four_what_is_pruned_weighs_at_most_twice_the_least() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    mask = transposable_nm_mask(weight, 4, 8)
    assert is_nm(mask.float(), 4, 8, 0)
    assert is_nm(mask.float(), 4, 8, 1)
    from scipy.optimize import linprog  # the polytope of such masks has whole corners, so the linear program is exact

    sides = torch.zeros(16, 64)
    for place in range(64):
        sides[place // 8, place] = sides[8 + place % 8, place] = 1
    least = linprog(weight.abs().flatten().numpy(), A_ub=-sides.numpy(), b_ub=[-4.0] * 16, bounds=(0, 1)).fun
    pruned = float((weight.abs() * ~mask).sum())
    assert least <= pruned <= 2 * least


def test_convolutions_and_what_fills_no_block() -> None:
    weight = torch.randn(10, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = transposable_nm_mask(weight, 2, 4, 1, 0)
    assert is_nm(mask.float(), 2, 4, 1)
    assert is_nm(mask[:8, :4].float(), 2, 4, 0)
    assert mask[:, 4:].all()
    assert torch.equal(mask[8:], nm_mask(weight, 2, 4, 1)[8:])
    other = transposable_nm_mask(weight.transpose(0, 1).contiguous(), 2, 4, 0, 1)
    assert torch.equal(other.transpose(0, 1), mask)
    assert torch.equal(transposable_nm_mask(weight[:3], 2, 4, 1, 0), nm_mask(weight[:3], 2, 4, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_and_nan_stays_visible(dtype: torch.dtype) -> None:
    weight = torch.rand(8, 8, dtype=dtype)
    weight[2, 5] = float("nan")
    weight[6, 1] = float("-inf")
    mask = transposable_nm_mask(weight, 2, 4)
    assert mask[2, 5]
    assert mask[6, 1]
    assert mask.sum() == 32


def test_one_dimension_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="Use nm_mask for one"):
        transposable_nm_mask(torch.ones(8, 8), 2, 4, dim=0, across=0)
    nm_mask(torch.ones(8, 8), 2, 4)
