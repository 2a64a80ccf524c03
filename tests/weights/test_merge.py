"""Parts that go into their weights for a while."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_peft
from lightning_peft import SSF, Bone, DoRA, LoRA, Method
from lightning_peft.testing.modules import Plain, loader, mlp, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys.parts import GatePart
from lightning_peft.weights.parts import placed_parts, put_part

INPUTS = next(iter(loader(8)))[0]
MEMBERS: list[Method] = [LoRA(4, keep=True), DoRA(4, keep=True, name="lengths")]


def trained(*methods: Method) -> Plain:
    """A module with what its trainings left on it."""
    torch.manual_seed(0)
    module = Plain()
    for method in methods:
        fit([copy.deepcopy(method)], module=module)
    return module.eval()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", MEMBERS, ids=str)
def test_a_merged_network_is_a_plain_one_and_comes_back_to_the_bit(method: Method, monkeypatch: Any) -> None:
    module = trained(method)
    before, expected, first = state(module), module.logits(INPUTS), module.model[0].weight.clone()
    baked = lightning_peft.bake(copy.deepcopy(module))
    monkeypatch.setattr(type(next(placed_parts(module)).part), "around", lambda *_: pytest.fail("a part was called"))
    with lightning_peft.merge(module):
        assert torch.equal(module.logits(INPUTS), baked.logits(INPUTS))
        assert torch.equal(module.model[0].weight, baked.model[0].weight)
        assert not torch.equal(module.model[0].weight, first)
    monkeypatch.undo()
    assert same(state(module), before)
    assert torch.equal(module.logits(INPUTS), expected)
    torch.testing.assert_close(baked.logits(INPUTS), expected, atol=1e-5, rtol=1e-5)


def test_a_layer_whose_weight_is_mapped_too_stays_as_it_is() -> None:
    module = trained(MEMBERS[0], DoRA(4, keep=True, targets=["0"]))
    expected, first = module.logits(INPUTS), module.model[0]
    assert len(first.weight_maps) == len(first.part_stack.parts) == 1
    with lightning_peft.merge(module):
        torch.testing.assert_close(module.logits(INPUTS), expected, atol=1e-5, rtol=1e-5)
        assert not first.part_stack.beneath
        assert module.model[2].part_stack.beneath
    assert torch.equal(module.logits(INPUTS), expected)


def test_what_acts_on_weights_alone_is_named_and_can_be_baked() -> None:
    module = trained(Bone(1, keep=True, exclude=None))
    with pytest.raises(MisconfigurationException, match=r"'weight_delta' of Bone.*bake\(module\)"):
        lightning_peft.merge(module)
    expected = module.logits(INPUTS)
    torch.testing.assert_close(lightning_peft.bake(module).logits(INPUTS), expected, atol=1e-5, rtol=1e-5)


def test_files_copies_and_baking_know_of_it() -> None:
    module = trained(MEMBERS[0])
    before, answer = state(module), lightning_peft.bake(copy.deepcopy(module)).logits(INPUTS)
    lightning_peft.merge(module)
    assert same(state(module), before), "a file would hold the adapter twice"
    twin = copy.deepcopy(module)
    for copied in (pickle.loads(pickle.dumps(module)), lightning_peft.bake(twin)):
        assert torch.equal(copied.logits(INPUTS), answer)
    module.to(torch.float64)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float64}
    lightning_peft.unmerge(module)
    assert same(state(module.to(torch.float32)), before)


def test_loaded_weights_go_beneath_the_parts() -> None:
    module, other = trained(MEMBERS[0]), trained(MEMBERS[0])
    with torch.no_grad():
        other.model[0].weight.add_(1.0)
    lightning_peft.merge(module)
    module.load_state_dict(other.state_dict())
    lightning_peft.unmerge(module)
    assert torch.equal(module.logits(INPUTS), other.logits(INPUTS))


def test_a_fit_goes_on_from_the_parts() -> None:
    module, other = trained(MEMBERS[0]), trained(MEMBERS[0])
    lightning_peft.merge(module)
    for each in (module.train(), other.train()):
        fit([LoRA(4, keep=True)], module=each)
    assert same(state(module), state(other))


def test_an_evaluation_of_a_merged_module_leaves_it_merged() -> None:
    module = trained(MEMBERS[0])
    lightning_peft.merge(module)
    weight = module.model[0].weight.clone()
    trainer().test(module, loader())
    assert torch.equal(module.model[0].weight, weight)


def test_what_would_do_nothing_is_refused_and_the_advice_works(tmp_path: Any) -> None:
    module = trained(MEMBERS[0])
    lightning_peft.save_peft(module.model, tmp_path)
    lightning_peft.merge(module)
    changes = [
        lambda: lightning_peft.switch(module, "lora", on=False),
        lambda: lightning_peft.blend(module, {"lora": 0.5}),
        lambda: lightning_peft.load_peft(module.model, tmp_path, name="other"),
        lambda: lightning_peft.merge(module),
    ]
    before = state(module)
    for change in changes[:3]:
        with pytest.raises(MisconfigurationException, match=r"lightning_peft\.unmerge\(module\)"):
            change()
    with pytest.raises(MisconfigurationException, match="merged already"):
        changes[3]()
    assert same(state(module), before)
    lightning_peft.unmerge(module)
    for change in changes:
        change()


def test_what_cannot_be_merged_is_refused_before_anything_changes() -> None:
    with pytest.raises(MisconfigurationException, match="keep=True"):
        lightning_peft.merge(mlp())
    module = trained(MEMBERS[0])
    parts = [each.part for each in placed_parts(module)]
    with torch.no_grad():
        parts[1].form.up[0, 0] = float("nan")
    before = state(module)
    with pytest.raises(MisconfigurationException, match=r"not finite.*switch"):
        lightning_peft.merge(module)
    assert all(torch.equal(before[key].nan_to_num(), value.nan_to_num()) for key, value in module.state_dict().items())
    with torch.no_grad():
        parts[1].form.up[0, 0] = 0.0
    gate = put_part(module, "model.0", GatePart(16))
    gate.owner, gate.method = "Gate", "gate"
    with pytest.raises(MisconfigurationException, match=r"no weight can.*'gate', on=False"):
        lightning_peft.merge(module)
    lightning_peft.switch(module, "gate", on=False)
    with lightning_peft.merge(module):
        pass


def test_a_bias_comes_and_goes_with_its_weight() -> None:
    module = trained(SSF(keep=True))
    before, expected = state(module), module.logits(INPUTS)
    with lightning_peft.merge(module):
        assert not torch.equal(module.model[0].bias, before["model.0.bias"])
        torch.testing.assert_close(module.logits(INPUTS), expected, atol=1e-5, rtol=1e-5)
    assert same(state(module), before)
