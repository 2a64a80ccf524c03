"""The proof counts what is stored, and the assertion points at the group."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.baking.nm_proof import (
    assert_nm,
    assert_nm_state_dict,
    prove_nm,
    prove_nm_state_dict,
)
from lightning_peft.network.nm_layers import input_dim
from lightning_peft.weights.nm import nm_mask


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 6))
    for layer, (n, m) in ((net[0], (2, 4)), (net[3], (1, 8))):
        layer.weight.data *= nm_mask(layer.weight, n, m, input_dim(layer))
    return net


def test_counts(model: nn.Sequential) -> None:
    conv, linear = prove_nm(model, {"0": (2, 4), "3": "1:8"})
    assert (conv.name, conv.shape, conv.n, conv.m) == ("0", (4, 8, 3, 3), 2, 4)
    assert (conv.groups, conv.violations, conv.exact_groups, conv.remainder, conv.density) == (72, 0, 72, 0, 0.5)
    assert (linear.groups, linear.exact_groups, linear.remainder) == (12, 12, 2)
    assert linear.density == pytest.approx((2 + 2) / 18)
    assert conv.holds
    packed = np.packbits((model[0].weight.detach() != 0).numpy().reshape(-1))
    assert conv.mask_sha256 == hashlib.sha256(packed.tobytes()).hexdigest()


def test_one_pattern_covers_every_layer_and_reports_violations(model: nn.Sequential) -> None:
    conv, linear = prove_nm(model, (1, 4))
    assert conv.violations == 72
    assert not conv.holds
    assert linear.violations == 0
    assert linear.exact_groups == 12  # 1:8 fills one of two 1:4 groups


def test_exact_zeros_lower_the_exact_groups_only(model: nn.Sequential) -> None:
    before = prove_nm(model, {"3": (1, 8)})[0]
    model[3].weight.data[0] = 0.0
    after = prove_nm(model, {"3": (1, 8)})[0]
    assert (after.violations, after.exact_groups) == (0, before.exact_groups - 2)
    assert after.mask_sha256 != before.mask_sha256


def test_assert_names_layer_and_group(model: nn.Sequential) -> None:
    assert assert_nm(model, {"0": "2:4", "3": "1:8"}) == prove_nm(model, {"0": "2:4", "3": "1:8"})
    model[3].weight.data[2, 8:10] = 7.0
    with pytest.raises(AssertionError, match=r"3 is not 1:8 sparse.*1 of 12 groups.*first group \(2, 1\).*7\.0, 7\.0"):
        assert_nm(model, {"0": "2:4", "3": "1:8"})


def test_a_layer_without_groups_proves_nothing(model: nn.Sequential) -> None:
    assert not prove_nm(model, {"3": (1, 32)})[0].holds
    with pytest.raises(AssertionError, match="smaller than M"):
        assert_nm(model, {"3": (1, 32)})


def test_state_dict(model: nn.Sequential) -> None:
    state = model.state_dict()
    patterns = {"0.weight": "2:4", "3.weight": (1, 8)}
    by_state, by_module = prove_nm_state_dict(state, patterns), prove_nm(model, {"0": "2:4", "3": (1, 8)})
    assert [proof.mask_sha256 for proof in by_state] == [proof.mask_sha256 for proof in by_module]
    transposed = {"w": state["3.weight"].t().contiguous()}
    assert assert_nm_state_dict(transposed, {"w": "1:8"}, dims={"w": 0})[0].groups == 12
    with pytest.raises(AssertionError, match="w is not 1:4"):
        assert_nm_state_dict({"w": torch.ones(2, 4)}, {"w": "1:4"})


def test_bfloat16_and_nan(model: nn.Sequential) -> None:
    state = {"w": torch.tensor([[float("nan"), 0, 0, 1.0]], dtype=torch.bfloat16)}
    assert prove_nm_state_dict(state, {"w": (2, 4)})[0].exact_groups == 1


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda net: prove_nm(net, {"4": "2:4"}), "Nearest names: '0', '3'"),
        (lambda net: prove_nm(net, {"1": "2:4"}), "No layer '1'"),
        (lambda net: prove_nm(nn.ReLU(), "2:4"), "no layer"),
        (lambda net: prove_nm_state_dict(net.state_dict(), {"0.weigth": "2:4"}), "'0.weight'"),
        (lambda net: prove_nm_state_dict(net.state_dict(), {"0.weight": "2:4"}, {}), "pass dims=1"),
    ],
)
def test_bad_input_names_the_fix(model: nn.Sequential, call, fix: str) -> None:
    with pytest.raises(MisconfigurationException, match=fix):
        call(model)
