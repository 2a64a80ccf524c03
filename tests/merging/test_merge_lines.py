"""LiNeS: beside the official code, whose values are recorded, and by hand."""

from __future__ import annotations

import pytest
import torch
from flat_models import OFFICIAL, chirps, flat, same, sines

from lightning_peft import merge

NAMES = ["stem.weight", "blocks.0.weight", "blocks.1.weight", "blocks.2.weight", "head.weight"]


def of_blocks(row):
    return dict(zip(NAMES, row.split(12), strict=True))


def merged(deltas, method="lines", **more):
    return flat(merge([of_blocks(row) for row in deltas], method, base=of_blocks(torch.zeros_like(deltas[0])), **more))


@pytest.mark.parametrize("case", OFFICIAL["lines"]["cases"], ids=lambda case: f"{case['models']}-{case['combine']}")
def test_it_is_the_official_code_s(case):
    found = merged(sines(case["models"]), growth=case["growth"], combine=case["combine"])
    assert same(found, case["merged"])


def test_a_sum_begins_with_the_mean_and_grows_with_depth():
    deltas = sines(3)
    for growth in (0.0, 0.8):
        factors = 1 / 3 + growth * torch.tensor([0, 0, 0.5, 1, 0]).double().repeat_interleave(12)
        assert torch.allclose(merged(deltas, growth=growth), deltas.sum(0) * factors)


def test_of_one_model_a_scale_does_the_same():
    delta = sines(1)
    assert torch.allclose(merged(delta, growth=0.5), merged(delta, "task_arithmetic", scale=(1.0, 1.5)))
    assert torch.equal(merged(delta, "task_arithmetic", scale=(1.0, 1.0)), delta[0])
    assert torch.equal(merged(delta, "task_arithmetic", scale=(0.1, 1.0))[36:48], delta[0, 36:48])


def test_an_election_is_scaled_to_the_size_of_the_mean():
    deltas = chirps(3, 60)
    elected = merged(deltas, "ties", density=0.4)
    scaled = merged(deltas, combine="elect", density=0.4, growth=0.0)
    assert scaled.abs().sum() == pytest.approx(float(deltas.mean(0).abs().sum()))
    assert torch.allclose(scaled / scaled.norm(), elected / elected.norm())


def test_models_that_cancel_out_stay_the_base():
    deltas = sines(1).repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    assert not merged(deltas).any()
