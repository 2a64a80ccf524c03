"""What each merge function computes: beside official codes, whose values are recorded, and by hand."""

from __future__ import annotations

import pytest
import torch
from flat_models import OFFICIAL, flat, merged, parted, sines

from lightning_peft import merge


@pytest.mark.parametrize("case", OFFICIAL["ties"]["cases"], ids=lambda case: f"{case['models']}-{case['density']}")
def test_ties_is_the_official_code_s(case):
    found = merged(sines(case["models"]), "ties", density=case["density"])
    assert torch.allclose(found, torch.tensor(case["merged"], dtype=torch.float64), atol=1e-15, rtol=0)


def test_ties_gives_sums_that_cancel_out_the_sign_that_most_elect():
    deltas = sines(2)
    deltas[1, ::2] = -deltas[0, ::2]
    expected = torch.tensor(OFFICIAL["ties"]["cancelling"], dtype=torch.float64)
    assert expected[::2].any(), "the case is there"
    assert torch.allclose(merged(deltas, "ties", density=0.5), expected, atol=1e-15, rtol=0)


def test_ties_of_each_tensor_finds_a_threshold_in_each():
    deltas = sines(2)
    deltas[:, :24] *= 100  # over all tensors nothing of the others would be left
    of_all, of_each = (merged(deltas, "ties", density=0.2, per_tensor=each) for each in (False, True))
    assert not of_all[24:].any()
    assert 0 < int(of_each[24:31].count_nonzero()) < 7
    one = merged(deltas[:, :24].repeat(1, 3)[:, :60], "ties", density=0.2)
    assert one.any()


def test_ties_of_models_that_agree_is_the_trimmed_difference():
    row = sines(1)
    kept = row.abs() >= row.abs().sort(descending=True).values[0, 12]  # one more than a fifth of sixty
    assert torch.allclose(merged(row.repeat(3, 1), "ties", density=0.2), (row * kept)[0])


def test_task_arithmetic_adds_and_takes_away():
    one, two = deltas = sines(2)
    assert torch.equal(merged(deltas[:1], "task_arithmetic"), one)
    assert torch.allclose(merged(deltas, "task_arithmetic", scale=0.3), 0.3 * (one + two))
    assert torch.allclose(merged(deltas, "task_arithmetic", weights=[1.0, -2.0]), one - 2 * two)
    assert torch.allclose(merged(deltas, "task_arithmetic", weights=[1.0, -1.0]), one - two)
    added = merge([parted(one)], "task_arithmetic", base=parted(two))
    assert torch.allclose(flat(added), one)


def test_soup_and_interpolation_by_hand():
    one, two = deltas = sines(2)
    assert torch.allclose(flat(merge([parted(one), parted(two)])), (one + two) / 2)
    assert torch.allclose(flat(merge([parted(one), parted(two)], weights=[1, 3])), one / 4 + two * 3 / 4)
    start = parted(two)
    for share in (0.0, 0.25, 1.0, 1.5):
        found = flat(merge([parted(one)], "interpolate", base=start, share=share))
        assert torch.allclose(found, two + share * (one - two))
    assert torch.equal(flat(merge([parted(one)], "interpolate", base=start, share=0.0)), two)
    assert torch.allclose(merged(deltas, "interpolate", weights=[1, 3]), (one / 4 + two * 3 / 4) / 2)


def test_dare_keeps_the_mean_and_is_the_same_for_a_seed():
    deltas = sines(1).repeat(1, 200)[:, :60]
    runs = torch.stack([merged(deltas, "dare", density=0.3, seed=seed) for seed in range(600)])
    spread = deltas.abs() * (0.7 / 0.3 / 600) ** 0.5  # of a mean of 600
    assert ((runs.mean(0) - deltas).abs() < 5 * spread).all()
    assert ((runs == 0) | ((runs - deltas / 0.3).abs() < 1e-12)).all()
    assert (runs != 0).double().mean() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(runs[3], merged(deltas, "dare", density=0.3, seed=3))
    assert not torch.equal(runs[3], runs[4])
    assert torch.equal(merged(deltas, "dare", density=1.0), deltas[0])
    assert torch.allclose(merged(deltas, "dare", density=0.3, rescale=0.6, seed=3), runs[3] / 2)


def test_dare_drops_of_each_model_and_tensor_by_its_own_chance():
    ones = torch.ones(2, 60, dtype=torch.float64)
    a, b = (
        merge([parted(row)] * 2, "dare", base=parted(0 * row), density=0.5, weights=pair)["a"]
        for row, pair in ((ones[0], [1.0, 1e-9]), (ones[0], [1e-9, 1.0]))
    )
    assert not torch.equal(a.round() != 0, b.round() != 0)


def test_dare_elects_signs_like_ties():
    deltas = torch.tensor([[3.0, -1.0, 2.0], [1.0, 4.0, -2.0]]).repeat(1, 20).double()
    assert torch.allclose(
        merged(deltas, "dare", density=1.0, combine="elect"), torch.tensor([2.0, 4.0, 2.0]).repeat(20).double()
    )
