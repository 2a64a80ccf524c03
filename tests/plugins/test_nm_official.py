"""STE and SR-STE beside runs of the official code; what those computed is in tests/fixtures."""

from __future__ import annotations

import pytest
import torch
from nm_official_network import EPOCHS, LR, SCALE, WEIGHT_DECAY, loader, network
from official_training import trained
from official_values import filled, values_of

from lightning_peft import NMSparsity

RUNS = values_of("nm_official")["runs"]


@pytest.mark.parametrize("run", RUNS)
def test_equals_the_official_run(run):
    pattern, recipe = run.split()
    net, expected = filled(network(), SCALE), RUNS[run]
    method = NMSparsity(pattern, recipe, targets="all-weights")
    module = trained(net, method, loader(), EPOCHS, LR, momentum=0.9, weight_decay=WEIGHT_DECAY)
    assert module.losses == pytest.approx(expected["losses"], abs=1e-9)
    for name, values in expected["trained"].items():
        stored = module.stored[f"{name}.weight"].flatten()
        assert torch.allclose(stored, torch.tensor(values, dtype=torch.float64), atol=1e-9, rtol=0)
        kept = net.get_submodule(name).weight.flatten() != 0
        assert "".join(str(int(place)) for place in kept) == expected["kept"][name]
