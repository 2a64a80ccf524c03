"""PCB-Merging: beside the official code, whose values are recorded, and by sorting whole vectors."""

from __future__ import annotations

import pytest
import torch
from flat_models import OFFICIAL, chirps, merged, same, sines
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft import merge
from lightning_peft_plugins.merging.pcb import bounds, levels, scores


@pytest.mark.parametrize("case", OFFICIAL["pcb"]["cases"], ids=lambda case: f"{case['models']}-{case['density']}")
def test_it_is_the_official_code_s(case):
    assert same(merged(sines(case["models"]), "pcb", density=case["density"]), case["merged"], atol=1e-13)


def test_it_is_the_official_code_s_where_magnitudes_are_clipped(monkeypatch):
    recorded, deltas = OFFICIAL["pcb"]["long"], chirps(3, 30000)
    parts = [{"a": row[:10000], "b": row[10000:].view(100, 200)} for row in deltas]
    found = merge(parts, "pcb", base={name: torch.zeros_like(part) for name, part in parts[0].items()})
    found = torch.cat([found["a"], found["b"].flatten()])
    assert recorded["cut"] > 0
    assert int(found.count_nonzero()) == recorded["nonzero"]
    waves = torch.sin(torch.arange(30000, dtype=torch.float64))
    assert [float(found.sum()), float((found * waves).sum()), float(found.abs().sum())] == pytest.approx(recorded["marks"])


@given(st.integers(1, 4), st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 50))
def test_levels_are_those_of_a_sort_below_zero_too(models, size, density, seed):
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(models, size, generator=generator, dtype=torch.float64).round(decimals=1)  # with ties and zeros
    pieces = deltas.split(7, dim=1)
    limits = bounds(lambda: iter(pieces))
    floor, largest = levels(lambda: iter(pieces), limits, density)
    order = scores(deltas, limits).sort(1).values
    assert torch.equal(floor, order[:, min(int(size * (1 - density)), size - 1)])
    assert torch.equal(largest, order[:, -1])
    assert torch.equal(limits[1], deltas.abs().sort(1).values[:, max(int(size * (1 - 1e-4) - 1), 0)])


def test_a_difference_against_the_sum_is_dropped():
    deltas = torch.full((2, 60), 1.0, dtype=torch.float64)
    deltas[1] = -0.5
    deltas[:, ::2] *= 1.5
    assert torch.allclose(merged(deltas, "pcb", density=0.5)[::2], deltas[0, ::2])


def test_of_one_model_the_largest_stay():
    delta = sines(1)[0]
    found = merged(delta[None], "pcb", density=0.2)
    kept = found != 0
    assert int(kept.sum()) == 11  # of twelve: the last of them has weight zero
    assert delta[kept].abs().min() > delta[~kept].abs().max()
    assert torch.allclose(found[kept], delta[kept].clamp(-found.abs().max(), found.abs().max()))


def test_equal_magnitudes_count_the_same_and_many_models_do_not_overflow():
    deltas = sines(1).sign()
    assert torch.equal(merged(deltas, "pcb", density=0.5), deltas[0])
    many = sines(1).repeat(200, 1)
    assert torch.allclose(merged(many.float(), "pcb", density=0.5).double(), merged(many, "pcb", density=0.5), atol=1e-4)
