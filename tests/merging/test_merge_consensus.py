"""TALL masks and consensus: beside the official code, whose values are recorded, and by hand."""

from __future__ import annotations

import pytest
import torch
from flat_models import OFFICIAL, chirps, merged, same, sines
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft import merge
from lightning_peft.functional import tall_masks

# For one model the official code asks for two tasks, and keeps nothing.
CASES = [case for case in OFFICIAL["consensus"]["cases"] if case["tasks"] <= case["models"]]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['models']}-{case['tasks']}-{case['strictness']}-{case['combine']}"
)
def test_it_is_the_official_code_s(case):
    deltas, more = sines(case["models"]), {"strictness": case["strictness"], "combine": case["combine"]}
    assert same(merged(deltas, "consensus", tasks=case["tasks"], **more), case["merged"])
    whole = merged(deltas, "consensus", tasks=0, **more)
    assert tall_masks(deltas, whole, case["strictness"]).sum(1).tolist() == case["counts"]


@given(st.integers(1, 4), st.floats(0, 3), st.integers(0, 50))
def test_masks_are_those_of_the_definition(models, strictness, seed):
    deltas = torch.randn(models, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    base, total = deltas.flip(1).sum(0), deltas.sum(0)
    tuned = base + deltas
    expected = (base - tuned).abs() > strictness * (base + total - tuned).abs()
    assert (tall_masks(deltas, total, strictness) == expected).double().mean() > 0.99  # the rounding of base has a say
    assert torch.equal(deltas.sum(0), total), "it leaves its arguments as they were"


def test_of_one_task_the_mask_is_all_that_changed():
    delta = sines(1)
    delta[0, 5] = 0
    assert torch.equal(tall_masks(delta, delta[0], 5.0)[0], delta[0] != 0)
    assert torch.equal(merged(delta, "consensus"), delta[0])


def test_it_keeps_less_the_more_tasks_must_agree_and_is_the_sum_for_none():
    deltas = chirps(4, 60)
    found = [merged(deltas, "consensus", tasks=tasks) for tasks in range(5)]
    counts = [int(each.count_nonzero()) for each in found]
    assert torch.allclose(found[0], deltas.sum(0))
    assert counts == sorted(counts, reverse=True)
    assert counts[2] < counts[1]
    masks = tall_masks(deltas, found[0])
    assert torch.equal(found[2] != 0, masks.sum(0) >= 2)


def test_an_election_is_that_of_ties_times_how_many_agree():
    deltas = chirps(3, 60)
    added, mean = merged(deltas, "consensus", tasks=0, combine="elect", density=0.7), merged(deltas, "ties", density=0.7)
    ratio = (added / mean)[mean != 0]
    assert torch.allclose(ratio, ratio.round())
    assert {1, 2} <= set(ratio.round().int().tolist())
    with pytest.raises(Exception, match=r"strictness=-1\.0 must not be negative"):
        merge([{"w": deltas[0]}], "consensus", base={"w": deltas[1]}, strictness=-1.0)
