"""Growth beside runs of the official codes; what those made of the same networks is in tests/fixtures."""

from __future__ import annotations

import pytest
import torch
from growth_official_networks import LR, Stack, loader
from official_llama import SCALE, Llama, Reader, sentence_loader
from official_training import Learner
from official_values import filled, values_of

from lightning_peft import LayerGrowth
from lightning_peft.testing.modules import trainer

RECORDED = values_of("growth_official")


@pytest.mark.parametrize("optimizer_state", RECORDED["StackedBERT"]["runs"])
def test_stackedbert_trains_on_as_from_the_official_checkpoint(optimizer_state):
    expected = RECORDED["StackedBERT"]["runs"][optimizer_state]
    module = Learner(filled(Stack(2), 0.5), LR, torch.optim.Adam)
    method = LayerGrowth("stackedbert", at="step:8", to=4, optimizer_state=optimizer_state)
    trainer(callbacks=[method], max_epochs=4, precision="64-true").fit(module, loader())
    assert module.losses == pytest.approx(expected["losses"], abs=1e-9)
    for name, values in expected["trained"].items():
        assert module.net.get_parameter(name).flatten().tolist() == pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize(("depth", "sources"), [("6", [0, 1, 1, 2, 3, 3]), ("8", [0, 0, 1, 1, 2, 2, 3, 3])])
def test_llama_pro_expands_as_the_official_script(depth, sources):
    module = Reader(filled(Llama(4), SCALE))
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    method = LayerGrowth("zero", at="step:1", sources=sources, train="new")
    trainer(callbacks=[method], max_epochs=1, precision="64-true").fit(module, sentence_loader())
    after, expected = module.net.state_dict(), RECORDED["LLaMA-Pro"]["holds"][depth]
    assert set(after) == set(expected)
    for name, source in expected.items():
        assert torch.equal(after[name], torch.zeros_like(after[name]) if source == "zero" else before[source]), name
