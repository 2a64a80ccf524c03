"""Growth in depth beside runs of the official codes; what those made of the same networks is in tests/fixtures."""

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


def read(method, blocks):
    """A small LLaMA before and after it grew between two sentences of which it learnt nothing."""
    module = Reader(filled(Llama(blocks), SCALE))
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    trainer(callbacks=[method], max_epochs=1, precision="64-true").fit(module, sentence_loader())
    return before, module.net.state_dict()


@pytest.mark.parametrize(("depth", "sources"), [("6", [0, 1, 1, 2, 3, 3]), ("8", [0, 0, 1, 1, 2, 2, 3, 3])])
def test_llama_pro_expands_as_the_official_script(depth, sources):
    before, after = read(LayerGrowth("zero", at="step:1", sources=sources, train="new"), 4)
    expected = RECORDED["LLaMA-Pro"]["holds"][depth]
    assert set(after) == set(expected)
    for name, source in expected.items():
        assert torch.equal(after[name], torch.zeros_like(after[name]) if source == "zero" else before[source]), name


@pytest.mark.parametrize("operator", RECORDED["G_stack"]["runs"])
def test_g_stack_and_its_rivals_copy_as_the_official_code(operator):
    expected = RECORDED["G_stack"]["runs"][operator]
    sources = expected["sources"]
    # The official G_zero puts each copy behind its source, ours puts all of them on top.
    size = {"sources": sources} if operator == "zero" else {"to": len(sources)}
    before, after = read(LayerGrowth(operator, at="step:1", **size), 3)
    blocks = {name.split(".")[2] for name in after if ".layers." in name}
    assert blocks == set(map(str, range(len(sources))))
    for name, value in after.items():
        if ".layers." not in name:
            assert torch.equal(value, before[name]), name
            continue
        start, place, rest = "model.layers", int(name.split(".")[2]), name.split(".", 3)[3]
        zero = place in expected["zeroed"] and rest in expected["zero"]
        assert torch.equal(value, torch.zeros_like(value) if zero else before[f"{start}.{sources[place]}.{rest}"]), name
