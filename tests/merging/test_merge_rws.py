"""Robust weight signatures: beside the official code, whose values are recorded, and by hand."""

from __future__ import annotations

import pytest
import torch
from flat_models import OFFICIAL, chirps, flat, same
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft import merge
from lightning_peft_plugins.merging.rws import signatures

SHAPES = {}
for layer in (0, 3, 6):
    SHAPES |= {f"features.{layer}.weight": (2, 3, 2, 2), f"features.{layer}.bias": (2,)}
SHAPES |= {"classifier.weight": (4, 2)}


def network(row):
    parts = row.split([torch.Size(shape).numel() for shape in SHAPES.values()])
    return {name: part.view(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def patched(rows, **more):
    return flat(merge([network(row) for row in rows], "rws", base=network(torch.zeros_like(rows[0])), **more))


@pytest.mark.parametrize("case", OFFICIAL["rws"]["cases"], ids=lambda case: f"{case['robust']}-{case['layers']}")
def test_it_is_the_official_code_s(case):
    rows = chirps(case["robust"] + 1, 86, start=0.4)
    assert same(patched(rows, until=(2 * case["layers"] - 1) / 6 + 0.01), case["merged"])


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 50))
def test_signatures_are_orthogonal_to_what_clean_training_changed(models, size, seed):
    generator = torch.Generator().manual_seed(seed)
    robust, clean = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((models, size), (size,)))
    found = signatures(robust, clean)
    assert (found @ clean).abs().max() < 1e-10
    assert torch.allclose(signatures(found, clean), found)


def test_weights_add_signatures_and_take_them_out_again():
    rows = chirps(3, 86)
    change = patched(rows, weights=[1, 2, 0], until=1) - rows[0]
    assert torch.allclose(change, 2 * (patched(rows[:2], until=1) - rows[0]))
    back = patched(rows, weights=[1, -2, 0], until=1) + change
    assert torch.allclose(back, rows[0])
    assert torch.equal(patched(rows[:1]), rows[0])
    with pytest.raises(Exception, match=r"until=2\.0 must be from 0 to 1"):
        patched(rows, until=2.0)
