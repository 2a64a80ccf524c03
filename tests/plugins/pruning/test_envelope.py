"""The sparse envelope of groups: known values, and that the proximal operator minimises what it should."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft_plugins.pruning.functional.group_envelope import group_envelope, group_envelope_scale

VALUES = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
NORMS = st.lists(st.floats(0.01, 10), min_size=2, max_size=8).map(lambda values: torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize(("k", "value"), [(1, 21.125), (2, 10.5625), (3, 7.625), (4, 7.125)])
def test_values_worked_out_by_hand(k: int, value: float) -> None:
    assert float(group_envelope(VALUES, k)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("strength", "k", "expected"),
    [
        (1.0, 1, [1.3333, 0.3333, 0, 0]),
        (1.0, 2, [1.5, 1, 0, 0]),
        (1.0, 3, [1.5, 1, 0.5, 0]),
        (1.0, 4, [1.5, 1, 0.5, 0.25]),
        (0.1, 1, [2.5357, 1.5357, 0.5357, 0.0357]),
        (0.1, 2, [2.7273, 1.7308, 0.7308, 0.2308]),
    ],
)
def test_proximal_operator_worked_out_by_hand(strength: float, k: int, expected: list[float]) -> None:
    moved = VALUES * group_envelope_scale(VALUES, k, strength)
    torch.testing.assert_close(moved, torch.tensor(expected, dtype=torch.float64), atol=5e-5, rtol=0)


@given(NORMS, st.integers(1, 4), st.floats(0.01, 5))
def test_the_proximal_operator_is_a_minimum(norms: torch.Tensor, k: int, strength: float) -> None:
    def objective(values: torch.Tensor) -> float:
        return float((values - norms).square().sum() / 2 + strength * group_envelope(values.abs(), k))

    best = norms * group_envelope_scale(norms, k, strength)
    lowest = objective(best)
    generator = torch.Generator().manual_seed(k)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(5):
            other = (best + size * torch.randn(len(norms), generator=generator, dtype=torch.float64)).clamp(min=0)
            assert lowest <= objective(other) + 1e-9


@given(NORMS)
def test_between_the_sum_of_norms_and_weight_decay(norms: torch.Tensor) -> None:
    assert float(group_envelope(norms, 1)) == pytest.approx(float(norms.sum().square() / 2))
    assert float(group_envelope(norms, len(norms))) == pytest.approx(float(norms.square().sum() / 2))
    values = [float(group_envelope(norms, k)) for k in range(1, len(norms) + 1)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(values))


def test_strengths_of_single_groups() -> None:
    """Groups of equal strength get what one number gives; a stronger one fades first."""
    same = group_envelope_scale(VALUES, 2, torch.full((4,), 0.5))
    torch.testing.assert_close(same, group_envelope_scale(VALUES, 2, 0.5))
    scales = group_envelope_scale(torch.ones(3), 2, torch.tensor([0.1, 0.1, 0.4]))
    assert scales[0] == scales[1] > scales[2]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="at least one group"):
        group_envelope(VALUES, 0)
    with pytest.raises(MisconfigurationException, match="must be positive"):
        group_envelope_scale(VALUES, 2, 0.0)
