from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft_plugins.sparsity._nm_sparsity.nm_schedule import NEVER, RECIPES, Phase, PhaseTimeline, needs_end, phase_at

LINE = PhaseTimeline(dense_end=10, sparse_end=90, total=100)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_starts_dense_and_ends_at_the_target(recipe):
    assert phase_at(9, LINE, recipe, 3, 8).decay == 1.0
    assert phase_at(90, LINE, recipe, 3, 8) == phase_at(100, LINE, recipe, 3, 8) == Phase(3, 8, 0.0)


@pytest.mark.parametrize("recipe", ["one-shot", "ste", "sr-ste"])
def test_binary_recipes_have_no_soft_phase(recipe):
    assert phase_at(10, LINE, recipe, 2, 4) == Phase(2, 4, 0.0)


def test_mdgf_follows_the_official_coefficients():
    # Official code: D = exp(-1e-4 s) and max(0, 1 - 2e-4 s), s updates after the dense phase.
    line = PhaseTimeline(100, 40_000, 40_000)
    assert phase_at(100 + 5000, line, "mdgf-exponential", 2, 4, 1e-4).decay == pytest.approx(0.606531, abs=1e-6)
    assert phase_at(100 + 20_001, line, "mdgf-exponential", 2, 4, 1e-4).decay == pytest.approx(0.135322, abs=1e-6)
    assert phase_at(100 + 2500, line, "mdgf-linear", 2, 4, 2e-4).decay == pytest.approx(0.5)
    assert phase_at(100 + 5000, line, "mdgf-linear", 2, 4, 2e-4).decay == 0.0


def test_automatic_decay_ends_where_the_official_run_ends():
    last = phase_at(89, LINE, "mdgf-exponential", 2, 4).decay
    assert math.exp(-10.9) < last < math.exp(-10.9 * 78 / 80)
    assert phase_at(10, LINE, "mdgf-exponential", 2, 4).decay == 1.0
    # 5,000 of the 109,200 updates of the official run: half of the way there is 2,500.
    long = PhaseTimeline(0, 109_200, 109_200)
    assert phase_at(2_500, long, "mdgf-linear", 2, 4).decay == pytest.approx(0.5)
    assert phase_at(4_999, long, "mdgf-linear", 2, 4).decay > 0.0
    assert phase_at(5_000, long, "mdgf-linear", 2, 4).decay == 0.0


@given(st.sampled_from(RECIPES), st.integers(1, 8), st.integers(2, 16), st.integers(0, 100))
def test_density_never_rises(recipe, n, m, step):
    n = min(n, m)

    def density(at):
        phase = phase_at(at, LINE, recipe, n, m)
        kept = phase.n / phase.m
        return kept + (1 - kept) * phase.decay

    assert density(step + 1) <= density(step) + 1e-12


def test_phases_that_do_not_fit_are_refused():
    with pytest.raises(MisconfigurationException, match="do not fit into 100 steps"):
        PhaseTimeline(dense_end=60, sparse_end=40, total=100)


def test_a_recipe_that_needs_no_end_is_the_same_whatever_the_end():
    endless, long = PhaseTimeline(5, NEVER, NEVER), PhaseTimeline(5, 10_000, 10_000)
    for recipe in RECIPES:
        if not needs_end(recipe, 1e-3):
            for step in (0, 4, 5, 6, 900):
                assert phase_at(step, endless, recipe, 2, 4, 1e-3) == phase_at(step, long, recipe, 2, 4, 1e-3)
        else:
            assert phase_at(900, PhaseTimeline(5, 1000, 1000), recipe, 2, 8) != phase_at(900, long, recipe, 2, 8)
