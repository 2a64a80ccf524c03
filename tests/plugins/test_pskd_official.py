"""PSKD beside runs of the official code; what those computed is in tests/fixtures."""

from __future__ import annotations

import pytest
import torch
from official_training import trained
from official_values import filled, values_of
from pskd_official_network import EPOCHS, LR, WEIGHT_DECAY, loader, network

from lightning_peft import PSKD
from lightning_peft.functional import pskd_alpha

RUNS = values_of("pskd_official")["runs"]


@pytest.mark.parametrize("sample_index", ["auto", "2"])
@pytest.mark.parametrize("alpha", RUNS)
def test_equals_the_official_run(alpha, sample_index):
    expected, method = RUNS[alpha], PSKD(float(alpha), sample_index)
    sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": WEIGHT_DECAY}
    module = trained(filled(network()), method, loader(sample_index == "2"), EPOCHS, LR, **sgd)
    assert module.losses == pytest.approx(expected["losses"], abs=1e-9)
    assert [pskd_alpha(epoch, EPOCHS, float(alpha)) for epoch in range(EPOCHS)] == pytest.approx(expected["alphas"], abs=1e-9)
    for name, values in expected["trained"].items():
        assert module.stored[name].flatten().tolist() == pytest.approx(values, abs=1e-9)
    rounded = torch.tensor(expected["memory"]).float()
    assert torch.allclose(method.memory.probabilities, rounded, atol=1e-7, rtol=0)
