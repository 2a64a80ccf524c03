"""MSG beside runs of the official code; what those computed is in tests/fixtures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from growth_official_networks import free
from msg_official_network import GROW_TIME, LR, loader, network
from official_training import Learner
from official_values import filled, marks, values_of

from lightning_peft import LayerGrowth
from lightning_peft.structure.width_map import Layer, WidthMap
from lightning_peft.testing.modules import trainer
from lightning_peft_plugins.growth._layer_growth import depth_operators, msg
from lightning_peft_plugins.growth._layer_growth.operators import OPERATORS

RECORDED = values_of("msg_official")
HIDDEN = {"*.intermediate.dense": Layer(output="ffn"), "*.layer.?.output.dense": Layer(input="ffn"), "*": None}
GROWTHS = {"depth": {"to": 4}, "ffn": {"to": {"ffn": 10}, "width_map": WidthMap({"ffn": 6}, HIDDEN)}}


def drawn(values, edit, generator):
    """New blocks of waves, where ours would draw."""
    return {name: free(value.shape) / 2 for name, value in depth_operators.drawn(values, edit, generator).items()}


def draws(value, generator):
    """New weights of waves and new biases of zero, as the official code has them."""
    return free(value.shape) / 2 / 0.02 if value.ndim > 1 else torch.zeros_like(value)


@pytest.mark.parametrize("growth", RECORDED["runs"])
def test_trains_on_as_the_official_code(growth, monkeypatch):
    pytest.importorskip("transformers")
    expected = RECORDED["runs"][growth]
    monkeypatch.setitem(OPERATORS, "msg", replace(OPERATORS["msg"], blocks=drawn))
    monkeypatch.setattr(msg, "normal_like", draws)
    module = Learner(filled(network(), 0.5), LR, torch.optim.Adam)
    method = LayerGrowth("msg", at="step:4", grow_time=GROW_TIME, **GROWTHS[growth])
    trainer(callbacks=[method], max_epochs=4, precision="64-true").fit(module, loader())
    assert module.losses == pytest.approx(expected["losses"], abs=1e-9)
    for name, tensor in module.net.named_parameters():
        assert marks(tensor.detach()) == pytest.approx(expected["marks"][name], abs=1e-9), name


def test_norms_count_units_as_the_official_code():
    x, weight, bias, mask, normed = (torch.tensor(value, dtype=torch.float64) for value in RECORDED["norm"].values())
    torch.testing.assert_close(msg.masked_layer_norm(x, mask, weight, bias, 1e-5), normed, atol=1e-9, rtol=0)
