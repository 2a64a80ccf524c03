"""TSV-M: beside FusionBench, whose values are recorded, and what singular values say of it."""

from __future__ import annotations

import pytest
import torch
from flat_models import OFFICIAL, chirps
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft import merge
from lightning_peft_plugins.merging.tsv import orthogonal


def tsv(deltas, **more):
    return merge([{"w": row} for row in deltas], "tsv", base={"w": torch.zeros_like(deltas[0])}, **more)["w"]


def values_of(matrix):
    return torch.linalg.svdvals(matrix)


@pytest.mark.parametrize("case", OFFICIAL["tsv"]["cases"], ids=lambda case: f"{case['models']}-{case['shape']}")
def test_it_is_fusionbench_s_where_models_divide_the_rank(case):
    deltas = chirps(case["models"], *case["shape"])
    assert torch.allclose(tsv(deltas), torch.tensor(case["w"], dtype=torch.float64), atol=1e-13)
    assert torch.allclose(tsv(deltas[:, 0]), torch.tensor(case["b"], dtype=torch.float64), atol=1e-15)


@given(st.integers(1, 5), st.integers(2, 7), st.integers(2, 7), st.integers(0, 50))
def test_singular_values_are_those_that_were_kept_and_none_is_lost(models, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(models, rows, columns, generator=generator, dtype=torch.float64)
    rank = min(rows, columns)
    share, left = divmod(rank, models)
    values = values_of(deltas)
    following = values[:, share].sort(descending=True).values[:left] if left else values[:0, 0]
    kept = torch.cat([values[:, :share].flatten(), following]).sort(descending=True).values
    assert len(kept) == rank
    assert torch.allclose(values_of(tsv(deltas)), kept, atol=1e-10)


def test_one_model_is_itself_and_orthogonal_ones_are_added():
    deltas = chirps(3, 9, 9)
    assert torch.allclose(tsv(deltas[:1]), deltas[0], atol=1e-14)
    apart = torch.zeros(3, 9, 9).double()
    for place, delta in enumerate(deltas):
        at = slice(3 * place, 3 * place + 3)
        apart[place, at, at] = delta[:3, :3]
    assert torch.allclose(tsv(apart), apart.sum(0), atol=1e-14)


def test_more_models_than_ranks_keep_the_largest_of_all():
    deltas = torch.zeros(4, 2, 3)
    for place, value in enumerate((1.0, 4.0, 3.0, 2.0)):
        deltas[place, place % 2, place % 3] = value
    assert values_of(tsv(deltas)).tolist() == pytest.approx([4.0, 3.0])


def test_models_that_say_the_same_or_nothing_do_not_disturb():
    delta = chirps(1, 8, 8)[0]
    left, values, right = torch.linalg.svd(delta)
    half = left[:, :4] * values[:4] @ right[:4]
    assert torch.allclose(tsv(torch.stack([delta, delta])), half, atol=1e-13)
    assert torch.allclose(tsv(torch.stack([delta, torch.zeros_like(delta)])), half, atol=1e-13)
    assert not tsv(torch.zeros(2, 8, 8)).any()


def test_weights_multiply_differences_first():
    deltas = chirps(2, 6, 6)
    weights = torch.tensor([2.0, -0.5]).double()
    assert torch.allclose(tsv(deltas, weights=weights.tolist()), tsv(deltas * weights[:, None, None]))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 50))
def test_polar_factors_are_orthonormal(length, count, seed):
    vectors = torch.randn(length, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = orthogonal(vectors)
    product = found.mT @ found if count <= length else found @ found.mT
    assert torch.allclose(product, torch.eye(min(length, count)).double(), atol=1e-10)
