"""OPCM: beside FusionBench, whose values are recorded, and what the paper proves of it."""

from __future__ import annotations

import pytest
import torch
from flat_models import OFFICIAL, chirps, flat, merged, same
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft import merge
from lightning_peft_plugins.merging.opcm import without

SHAPES = {"0.weight": (5, 7), "0.bias": (5,), "2.weight": (6, 5), "2.bias": (6,), "3.weight": (6,), "3.bias": (6,)}
SIZE = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def network(row):
    parts = row.split([torch.Size(shape).numel() for shape in SHAPES.values()])
    return {name: part.view(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def differences(models):
    return chirps(models, SIZE) * torch.tensor([1.0, 0.7, 1.3, 0.4], dtype=torch.float64)[:models, None]


def opcm(rows, **more):
    return flat(merge([network(row) for row in rows], "opcm", base=network(torch.zeros_like(rows[0])), **more))


@pytest.mark.parametrize("case", OFFICIAL["opcm"]["cases"], ids=lambda case: f"{case['models']}-{case['share']}")
def test_it_is_fusionbench_s_which_rescales_after_every_model(case):
    assert same(opcm(differences(case["models"]), share=case["share"]), case["merged"], atol=1e-13)


@pytest.mark.parametrize("models", [1, 2, 5])
def test_the_merged_norm_is_the_mean_norm(models):
    rows = chirps(models, SIZE) * torch.arange(1, models + 1)[:, None]
    assert opcm(rows).norm() == pytest.approx(float(rows.norm(dim=1).mean()))
    assert opcm(rows, scale=0.5).norm() == pytest.approx(float(rows.norm(dim=1).mean()) / 2)


@given(st.integers(0, 100), st.floats(0, 0.99), st.sampled_from([(4, 4), (3, 6), (6, 2)]), st.integers(1, 4))
def test_what_is_left_is_orthogonal_to_the_sum_and_a_projection(seed, share, shape, rank):
    generator = torch.Generator().manual_seed(seed)
    delta, left, right = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in (shape, (shape[0], rank), (rank, shape[1]))
    )
    total = left @ right
    rest = without(delta, total, share)
    assert abs(float((rest * total).sum())) < 1e-11
    assert torch.allclose(without(rest, total, share), rest)
    assert torch.allclose(without(delta, total * 1e3, share), rest)
    assert rest.norm() <= delta.norm() * (1 + 1e-12)


def test_a_higher_share_clears_more():
    one, two = differences(2)
    kept = [without(network(two)["0.weight"], network(one)["0.weight"], share).norm() for share in (0.0, 0.8, 0.99)]
    assert kept[0] > kept[1] > kept[2]


def test_a_model_that_says_the_same_adds_nothing_and_directions_of_no_size_are_left_alone():
    matrix = chirps(1, 4, 4)[0]
    assert without(matrix, matrix, 0.0).abs().max() < 1e-14
    assert torch.equal(without(matrix, torch.zeros(4, 4).double(), 0.5), matrix)
    corner = torch.zeros(4, 4).double()
    corner[0, 0] = 1.0
    expected = matrix.clone()
    expected[0, 0] = 0
    assert torch.allclose(without(matrix, corner, 0.5), expected)


def test_the_order_of_models_has_a_say():
    rows = differences(2)
    assert not torch.allclose(opcm(rows), opcm(rows.flip(0)))
    with pytest.raises(Exception, match=r"share=1\.0 must be from 0 to below 1"):
        merged(rows[:, :60], "opcm", share=1.0)
