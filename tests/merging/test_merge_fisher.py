"""Fisher merging: beside the official code, whose values are recorded, and by hand."""

from __future__ import annotations

import pytest
import torch
from flat_models import OFFICIAL, flat, parted, same, sines
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft import merge


def information():
    """Fisher information of three models: zeros, numbers below the floor, and a model that has more than the others."""
    found = sines(3).flip(1).abs() ** 3
    found[:, ::7] = 0.0
    found[1, ::3] = 1e-8
    found[2] *= 50
    return found


def merged(models, fisher, **more):
    return flat(merge([parted(row) for row in models], "fisher", fisher=[parted(row) for row in fisher], **more))


@pytest.mark.parametrize("case", OFFICIAL["fisher"]["cases"])
def test_it_is_the_official_code_s(case):
    more = {"weights": case["weights"], "normalise": case["normalise"], "favour_first": case["favor"]}
    assert same(merged(sines(3), information(), **more), case["merged"])


@given(st.lists(st.floats(0.01, 100), min_size=4, max_size=4), st.floats(0.01, 0.99), st.booleans())
def test_it_lies_between_models_and_is_what_their_shares_say(numbers, weight, normalise):
    values, fisher = torch.tensor([[1.0], [5.0]]).double(), torch.tensor(numbers).double().view(2, 2)
    models = [{"w": row.expand(2)} for row in values]
    found = merge(models, "fisher", fisher=[{"w": row} for row in fisher], weights=[weight, 1 - weight], normalise=normalise)[
        "w"
    ]
    shares = torch.tensor([weight, 1 - weight]).double()[:, None] * fisher
    if normalise:
        shares = shares / fisher.norm(dim=1, keepdim=True)
    assert torch.allclose(found, 1 + 4 * shares[1] / shares.sum(0))


def test_by_hand():
    models, fisher = (
        [{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}],
        [{"w": torch.tensor([each])} for each in (3.0, 1.0)],
    )
    found = [
        merge(models, "fisher", fisher=fisher, weights=[share, 1 - share], normalise=False)["w"] for share in (0.5, 0.25, 1, 0)
    ]
    assert torch.cat(found).tolist() == [2.0, 3.0, 1.0, 5.0]


def test_equal_information_gives_the_mean_and_its_scale_has_no_say():
    models, fisher = sines(3), information() + 1
    assert torch.allclose(merged(models, fisher[:1].expand(3, -1)), models.mean(0))
    assert torch.allclose(merged(models[:1].expand(3, -1), fisher), models[0])
    assert torch.allclose(merged(models, fisher), merged(models, fisher * 1e3))
    assert torch.allclose(merged(models, fisher), merged(models, fisher * torch.tensor([[1.0], [10.0], [0.1]])))
    assert not torch.allclose(merged(models, fisher), merged(models, fisher, normalise=False))


def test_entries_that_no_model_depends_on_are_a_mean_or_the_first_model_s():
    models, fisher = sines(3), torch.zeros(3, 60)
    assert torch.allclose(merged(models, fisher), models.mean(0))
    assert torch.allclose(merged(models, fisher, favour_first=True), models[0])
    assert torch.equal(merged(models, fisher, favour_first=True, weights=[0, 1, 1]), models[0])
    assert torch.equal(merged(models, fisher, floor=0.0), models[0])


def test_the_norm_is_that_of_all_tensors_or_of_each():
    models, fisher = sines(2), torch.ones(2, 60)
    fisher[1, :24] = 9.0
    of_all, of_each = (merged(models, fisher, per_tensor=each) for each in (False, True))
    assert torch.allclose(of_each, models.mean(0))
    norms = fisher.double().norm(dim=1)
    shares = (fisher / norms[:, None]).double()
    assert torch.allclose(of_all, (shares * models).sum(0) / shares.sum(0))
    with pytest.raises(Exception, match=r"floor=-1\.0 must not be negative"):
        merged(models, fisher, floor=-1.0)
