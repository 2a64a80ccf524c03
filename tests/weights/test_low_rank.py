from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft.weights import low_rank
from lightning_peft.weights.low_rank import as_matrix, energy_rank, from_matrix, truncate

SHAPES = [(6, 4), (3, 9), (5, 2, 3), (4, 3, 3, 3), (3, 4, 1, 5), (2, 3, 2, 2, 2)]


@pytest.mark.parametrize(("energy", "rank"), [(0.8, 1), (0.9, 2), (0.98, 3), (0.9999, 4), (1.0, 4), (1e-9, 1)])
def test_the_rank_of_the_official_code(energy: float, rank: int) -> None:
    assert energy_rank(torch.tensor([3.0, 1.0, 0.5, 0.1]), energy) == rank
    assert energy_rank(torch.zeros(3), 0.9) == 1


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=8), st.floats(0.01, 0.999))
def test_the_rank_is_the_smallest_that_reaches_the_energy(values: list[float], energy: float) -> None:
    sigma = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank, share = energy_rank(sigma, energy), sigma.square().cumsum(0) / sigma.square().sum()
    assert share[rank - 1] >= energy - 1e-12
    assert rank == 1 or share[rank - 2] < energy + 1e-12


@given(st.sampled_from(SHAPES), st.sampled_from(["channel", "spatial"]), st.floats(0.3, 0.99), st.integers(0, 99))
def test_truncation(shape: tuple[int, ...], scheme: str, energy: float, seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(from_matrix(as_matrix(weight, scheme), weight.shape, scheme), weight)  # type: ignore[arg-type]
    made = truncate(weight, energy, scheme)  # type: ignore[arg-type]
    assert made is not None
    sigma = torch.linalg.svdvals(as_matrix(weight, scheme))  # type: ignore[arg-type]
    kept = torch.linalg.svdvals(as_matrix(made.weight, scheme))  # type: ignore[arg-type]
    assert torch.linalg.matrix_rank(as_matrix(made.weight, scheme)) <= made.rank  # type: ignore[arg-type]
    torch.testing.assert_close(kept[: made.rank], sigma[: made.rank])
    torch.testing.assert_close((weight - made.weight).square().sum(), sigma[made.rank :].square().sum())  # Eckart and Young
    # U V^T: its inner product with the weight is the nuclear norm, and its own largest singular value is one.
    torch.testing.assert_close((made.pull * made.weight).sum(), kept.sum())
    torch.testing.assert_close(torch.linalg.matrix_norm(as_matrix(made.pull, scheme), 2), torch.ones((), dtype=torch.float64))  # type: ignore[arg-type]


def test_the_pull_is_the_gradient_of_the_nuclear_norm() -> None:
    weight = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.linalg.matrix_norm(weight, "nuc").backward()
    made = truncate(weight, 1.0)
    assert made is not None
    torch.testing.assert_close(made.pull, weight.grad)


def test_nothing_to_drop_changes_nothing() -> None:
    weight = torch.randn(5, 7)
    made = truncate(weight, 1.0)
    assert made is not None
    assert torch.equal(made.weight, weight)
    assert truncate(weight.bfloat16(), 0.9).weight.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_a_decomposition_that_fails_is_tried_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    assert truncate(torch.full((3, 3), torch.nan), 0.9) is None
    assert truncate(torch.full((3, 3), torch.inf), 0.9) is None
    real = torch.linalg.svd

    def fails_in_single(matrix: torch.Tensor, **kwargs: bool) -> object:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **kwargs)

    weight = torch.randn(4, 3)
    expected = truncate(weight, 0.7)
    monkeypatch.setattr(low_rank.torch.linalg, "svd", fails_in_single)
    made = truncate(weight, 0.7)
    assert made is not None
    assert expected is not None
    assert made.weight.dtype == torch.float32
    torch.testing.assert_close(made.weight, expected.weight)
