"""ComPEFT: beside the official code, whose values are recorded, and by hand."""

from __future__ import annotations

import pytest
import torch
from flat_models import OFFICIAL, chirps, merged, same, sines


@pytest.mark.parametrize("case", OFFICIAL["compeft"]["cases"], ids=lambda case: f"{case['density']}-{case['strength']}")
def test_it_is_the_official_code_s(case):
    found = merged(sines(1), "compeft", density=case["density"], strength=case["strength"])
    assert same(found, case["merged"])


def test_a_model_has_three_values_and_keeps_all_signs_at_full_density():
    delta = chirps(1, 60)
    assert len(merged(delta, "compeft", density=0.3).unique()) == 3
    assert torch.equal(merged(delta, "compeft", density=1.0).sign(), delta[0].sign())


def test_models_are_compressed_one_by_one_and_added():
    deltas = chirps(3, 60) * torch.tensor([[1.0], [10.0], [0.1]])
    single = torch.stack([merged(row[None], "compeft") for row in deltas])
    assert torch.allclose(merged(deltas, "compeft", weights=[1, -2, 3]), single[0] - 2 * single[1] + 3 * single[2])
    assert single[1].max() == pytest.approx(float(deltas[1].std()))


def test_a_size_of_none_is_refused():
    with pytest.raises(Exception, match=r"strength=0\.0 must be"):
        merged(sines(1), "compeft", strength=0.0)
