from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft.weights.importance import gradient, magnitude, taylor

torch.set_num_threads(1)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_scores_are_non_negative_pure_and_follow_their_formula(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(rows, columns, generator=generator))
    grad = torch.randn(rows, columns, generator=generator)
    for score, expected in [
        (magnitude(weight), weight**2),
        (gradient(weight, grad), grad**2),
        (taylor(weight, grad), (weight * grad) ** 2),
    ]:
        assert not score.requires_grad
        assert (score >= 0).all()
        torch.testing.assert_close(score**2, expected.detach())


def test_taylor_is_exact_for_a_loss_linear_in_the_weight() -> None:
    weight = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    slope = torch.tensor([0.5, 4.0, -1.0])
    loss = (weight * slope).sum()
    loss.backward()
    for index, score in enumerate(taylor(weight, weight.grad)):
        without = weight.detach().clone()
        without[index] = 0
        assert score == (loss - (without * slope).sum()).abs()


@pytest.mark.parametrize("score", [gradient, taylor])
def test_shapes_must_agree(score: object) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
        score(torch.ones(2, 3), torch.ones(3))  # type: ignore[operator]
