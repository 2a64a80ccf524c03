"""Which groups stay: against sorting, and at the edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.utils import prune

from lightning_peft.weights.choose import keep_largest

VALUES = st.lists(st.integers(0, 4), min_size=1, max_size=40)  # many ties


def sorted_reference(values: Tensor, pruned: int) -> Tensor:
    kept = torch.ones_like(values, dtype=torch.bool)
    kept[values.argsort(stable=True)[:pruned]] = False
    return kept


@given(VALUES, st.floats(0, 1))
def test_one_layer_is_as_sorted(values: list[int], amount: float) -> None:
    scores = torch.tensor(values, dtype=torch.float32).view(1, -1)
    kept = keep_largest({"a": scores}, amount, "layer")["a"].flatten()
    pruned = min(int(amount * len(values) + 1e-6), len(values) - 1)
    assert torch.equal(kept, sorted_reference(scores.flatten(), pruned))


@given(VALUES, VALUES, st.floats(0, 0.99))
def test_layers_ranked_together(first: list[int], second: list[int], amount: float) -> None:
    scores = {"a": torch.tensor(first, dtype=torch.float32), "b": torch.tensor(second, dtype=torch.float32)}
    kept = keep_largest(scores, amount)
    flat = torch.cat(list(scores.values()))
    reference = sorted_reference(flat, int(amount * len(flat) + 1e-6)).split([len(first), len(second)])
    for mask, expected in zip(kept.values(), reference, strict=True):
        assert mask.any(), "no layer is pruned whole"
        assert torch.equal(mask, expected) or (not expected.any() and mask.sum() == 1)


@given(st.integers(1, 6), st.integers(1, 9), st.floats(0, 1))
def test_each_row_loses_as_many(rows: int, columns: int, amount: float) -> None:
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(columns))
    kept = keep_largest({"a": scores}, amount, "row")["a"]
    pruned = min(int(amount * columns + 1e-6), columns - 1)
    assert (kept.sum(1) == columns - pruned).all()
    assert (scores.masked_fill(~kept, 2.0).amin(1) >= scores.masked_fill(kept, -1.0).amax(1)).all()


def test_as_torchs_own_pruning_does() -> None:
    layers = [torch.nn.Linear(30, 20), torch.nn.Linear(20, 10)]
    scores = {str(index): layer.weight.detach().abs() for index, layer in enumerate(layers)}
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.7)
    kept = keep_largest(scores, 0.7)
    assert all(torch.equal(kept[str(index)], layer.weight_mask.bool()) for index, layer in enumerate(layers))


def test_groups_of_different_sizes_share_the_amount_of_weights() -> None:
    scores = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([2.0, 3.0])}
    sizes = {"a": torch.tensor([10, 10]), "b": torch.tensor([1, 1])}
    assert keep_largest(scores, 0.5, sizes=sizes)["a"].tolist() == [False, True]
    assert keep_largest(scores, 0.5, sizes=sizes)["b"].tolist() == [False, True], "10 + 1 of 22 weights"
    assert keep_largest(scores, 0.45, sizes=sizes)["b"].tolist() == [True, True], "9 of 22 are less than the first group"


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"Scores of layer\.weight are NaN.*detect_anomaly"):
        keep_largest({"layer.weight": torch.tensor([1.0, torch.nan])}, 0.5)
    with pytest.raises(MisconfigurationException, match="from 0 to 1"):
        keep_largest({}, 1.5)
    with pytest.raises(MisconfigurationException, match="global, layer, row"):
        keep_largest({}, 0.5, "all")  # type: ignore[arg-type]
    assert keep_largest({}, 0.5) == {}


@pytest.mark.parametrize(("amount", "gone"), [(0.29, 29), (0.57, 57), (0.58, 58)])
def test_a_share_that_has_no_exact_binary_form_is_not_one_short(amount: float, gone: int) -> None:
    assert amount * 100 < gone or amount == 0.58
    kept = keep_largest({"w": torch.arange(100.0)}, amount)["w"]
    assert int((~kept).sum()) == gone
