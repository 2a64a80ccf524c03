"""The PQ index: test vectors of the official code, and what must hold for every vector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.functional import pq_index, pq_pruned

VECTORS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30).map(torch.tensor)


@pytest.mark.parametrize(
    ("values", "index", "kept", "other"),
    [
        ([1, 0, 0, 0], 0.75, 1, 0.5),
        ([1, 1, 1, 1], 0.0, 4, 0.0),
        ([2, 1, 0, 0], 0.514298, 2, 0.32918),
        ([1, 2, 3, 4], 0.055586, 4, 0.087129),
    ],
)
def test_vectors_of_the_official_code(values: list[float], index: float, kept: int, other: float) -> None:
    vector = torch.tensor(values, dtype=torch.float64)
    assert pq_index(vector) == pytest.approx(index, abs=1e-6)
    assert pq_index(vector, 1, 2) == pytest.approx(other, abs=1e-6)
    assert 4 - pq_pruned(vector, beta=1.0) == kept


@given(VECTORS, st.floats(0.1, 1000))
def test_the_index_knows_no_scale_and_no_copies(vector: torch.Tensor, scale: float) -> None:
    index = pq_index(vector)
    assert 0 <= index < 1
    assert pq_index(vector.double() * scale) == pytest.approx(index, abs=1e-9)
    assert pq_index(torch.cat([vector, vector])) == pytest.approx(index, abs=1e-9)


@given(VECTORS, st.floats(0, 1), st.floats(0.1, 0.95))
def test_no_more_goes_than_allowed(vector: torch.Tensor, eta: float, beta: float) -> None:
    assert 0 <= pq_pruned(vector, eta=eta, beta=beta) <= beta * len(vector) + 1e-6
    assert pq_pruned(vector, eta=eta) >= pq_pruned(vector)


def test_edges() -> None:
    assert pq_pruned(torch.ones(1000)) == 0
    assert pq_pruned(torch.empty(0)) == 0
    assert pq_index(torch.zeros(3)) == 0.0
    assert pq_index(torch.full((3,), 1e30)) == 0.0
    with pytest.raises(MisconfigurationException, match="0 < p < q"):
        pq_index(torch.ones(2), 1.0, 0.5)
