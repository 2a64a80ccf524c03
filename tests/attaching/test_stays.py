"""Maps and parts that stay on a module when a fit is over."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

import lightning_peft
from lightning_peft import StructuredPruning
from lightning_peft.testing.callbacks import StopAfter
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyLowRank, ToyScale, ToyShift, ToyThreshold
from lightning_peft.testing.trace import difference, trace
from lightning_peft.weights.detach import attachments


def kept(method, **attributes):
    method.stays = True
    for name, value in attributes.items():
        setattr(method, name, value)
    return method


def answer(module) -> torch.Tensor:
    with torch.no_grad():
        return module.eval().logits(next(iter(loader(8)))[0])


def names(module) -> list[str]:
    return [f"{each.method}:{each.kind}" for each in attachments(module)]


@pytest.fixture
def adapted() -> Plain:
    """A module that a map and a part of two methods stayed on."""
    return fit([kept(ToyShift()), kept(ToyLowRank())]).module


def test_what_stays_is_live_and_computes_what_an_ordinary_fit_bakes() -> None:
    live, ordinary = fit([kept(ToyShift()), kept(ToyLowRank())]).module, fit([ToyShift(), ToyLowRank()]).module
    assert names(live) == ["toy_shift:toy_shift"] * 3 + ["toy_low_rank:toy_low_rank"] * 3
    assert not attachments(ordinary)
    assert {name for name, _ in live.named_parameters()} > {name for name, _ in ordinary.named_parameters()}
    torch.testing.assert_close(answer(live), answer(ordinary), atol=1e-6, rtol=0)
    baked = lightning_peft.bake(copy.deepcopy(live))
    for name, tensor in ordinary.state_dict().items():
        torch.testing.assert_close(baked.state_dict()[name], tensor, atol=1e-6, rtol=0)
    assert difference(trace(ordinary), trace(baked)) is None


def test_switched_off_the_network_is_the_stored_one(adapted) -> None:
    with_both, plain = answer(adapted), Plain()
    parameters = dict(adapted.named_parameters())  # the stored values, whatever the layers compute with
    plain.load_state_dict({name: parameters[name].detach() for name in plain.state_dict()})
    with lightning_peft.switch(adapted, "toy_shift", on=False), lightning_peft.switch(adapted, "toy_low_rank", on=False):
        assert torch.equal(answer(adapted), answer(plain))
    assert torch.equal(answer(adapted), with_both)
    assert not torch.equal(with_both, answer(plain))


def test_one_of_two_is_switched(adapted) -> None:
    lightning_peft.switch(adapted, "toy_low_rank", on=False)
    without = answer(adapted)
    baked = lightning_peft.bake(copy.deepcopy(adapted))
    torch.testing.assert_close(answer(baked), without)
    lightning_peft.switch(adapted, "toy_low_rank")
    assert (answer(adapted) - without).abs().max() > 1e-4


def test_a_switch_says_what_there_is(adapted) -> None:
    with pytest.raises(MisconfigurationException, match=r"'lora' has neither .* there is toy_low_rank, toy_shift"):
        lightning_peft.switch(adapted, "lora", on=False)
    with pytest.raises(MisconfigurationException, match="there is nothing at all"):
        lightning_peft.switch(lightning_peft.bake(adapted), "toy_shift", on=False)


def test_weights_in_another_form_cannot_be_switched_off() -> None:
    module = fit([kept(ToyScale())]).module
    with pytest.raises(MisconfigurationException, match=r"stores weights in another form.*bake\(module\)"):
        lightning_peft.switch(module, "toy_scale", on=False)
    assert names(lightning_peft.bake(module)) == []


def test_a_reference_inside_the_training_step() -> None:
    seen = []

    class Preferring(Plain):
        def training_step(self, batch, batch_idx):
            with torch.no_grad(), lightning_peft.switch(self, "toy_low_rank", on=False):
                reference = self.logits(batch[0])
            with torch.no_grad():
                seen.append((self.logits(batch[0]) - reference).abs().max().item())
            return super().training_step(batch, batch_idx)

    fit([ToyLowRank()], style=Preferring)
    assert seen[0] == 0.0, "the part starts at zero"
    assert seen[-1] > 0.0


@pytest.mark.parametrize("keeps", ["shift", "low rank"])
def test_a_mask_outside_of_what_stays_is_turned_away_and_the_ways_out_work(keeps) -> None:
    inner = kept(ToyShift()) if keeps == "shift" else kept(ToyScale())
    module = Plain()
    with pytest.raises(MisconfigurationException, match="stands outside of it") as error:
        fit([inner, ToyThreshold()], module=module)
    assert names(module) == []
    for advice in ("toy_threshold.stays = True", "lightning_peft.bake(module)", "exclude=['model.0']"):
        assert advice in str(error.value)
    both = fit([inner, kept(ToyThreshold())], module=module).module
    assert len(names(both)) == 6
    fit([ToyThreshold()], module=lightning_peft.bake(both))
    apart = fit([kept(ToyShift(exclude=["model.0"])), ToyThreshold(targets=["model.0"])]).module
    assert names(apart) == ["toy_shift:toy_shift"] * 2


def test_what_stands_inside_goes_into_the_stored_weight() -> None:
    run = fit([ToyScale(), kept(ToyShift())])
    ordinary = fit([ToyScale(), ToyShift()]).module
    assert names(run.module) == ["toy_shift:toy_shift"] * 3
    torch.testing.assert_close(answer(run.module), answer(ordinary), atol=1e-6, rtol=0)
    before = answer(run.module)
    again = fit([ToyScale(), kept(ToyShift())], module=run.module, max_steps=0, expected=[".*"])
    torch.testing.assert_close(answer(again.module), before, atol=1e-6, rtol=0)


def test_of_two_parts_on_a_layer_the_inner_one_goes_into_the_weight() -> None:
    live = fit([ToyLowRank(name="a"), kept(ToyLowRank(rank=1, name="b"))]).module
    ordinary = fit([ToyLowRank(name="a"), ToyLowRank(rank=1, name="b")]).module
    assert names(live) == ["b:toy_low_rank"] * 3
    torch.testing.assert_close(answer(live), answer(ordinary), atol=1e-6, rtol=0)


def test_an_evaluation_leaves_what_stays(adapted) -> None:
    before, answered = trace(adapted), answer(adapted)
    adapted.train()
    for methods in ([ToyScale()], [ToyShift(), ToyLowRank()], [kept(ToyScale())]):
        seen = trainer(callbacks=methods).predict(adapted, loader(8))
        torch.testing.assert_close(seen[0], answered, atol=1e-6, rtol=0)
        assert torch.equal(answer(adapted), answered)
        adapted.train()
        assert difference(before, trace(adapted)) is None


def test_a_fit_of_other_methods_trains_what_stays_too(adapted) -> None:
    before = {name: tensor.clone() for name, tensor in adapted.named_parameters()}
    fit([ToyScale()], module=adapted)
    assert names(adapted) == ["toy_shift:toy_shift"] * 3 + ["toy_low_rank:toy_low_rank"] * 3
    same = [name for name, tensor in adapted.named_parameters() if torch.equal(before[name], tensor)]
    assert same == []


def test_its_own_method_goes_on_and_bakes_when_it_no_longer_keeps(adapted) -> None:
    objects = attachments(adapted)[3:]
    fit([ToyShift(), kept(ToyLowRank())], module=adapted)
    assert names(adapted) == ["toy_low_rank:toy_low_rank"] * 3
    assert all(each is other for each, other in zip(attachments(adapted), objects, strict=True)), "not made anew"
    fit([ToyLowRank()], module=adapted)
    assert names(adapted) == []
    assert difference(trace(fit([]).module), trace(adapted)) is None


def test_a_fit_that_fails_before_its_first_step_leaves_what_was_there(adapted) -> None:
    before, answered = trace(adapted), answer(adapted)
    adapted.train()

    class Broken(ToyShift):
        def start(self, run):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fit([Broken(name="toy_shift"), ToyScale()], module=adapted)
    assert difference(before, trace(adapted)) is None
    assert torch.equal(answer(adapted), answered)


def test_two_of_one_class_stand_on_one_layer() -> None:
    module = fit([kept(ToyLowRank(name="german")), kept(ToyShift(name="one"))]).module
    fit([kept(ToyLowRank(name="french")), kept(ToyShift(name="two"))], module=module)
    assert sorted(set(names(module))) == [
        *("french:toy_low_rank", "german:toy_low_rank"),
        *("one:toy_shift", "two:toy_shift"),
    ]
    everything = answer(module)
    for name in ("german", "french", "one", "two"):
        with lightning_peft.switch(module, name, on=False):
            assert (answer(module) - everything).abs().max() > 1e-4
    assert torch.equal(answer(module), everything)


def test_copies_keep_and_pickles_are_ordinary(adapted) -> None:
    twin = copy.deepcopy(adapted)
    assert names(twin) == names(adapted)
    assert torch.equal(answer(twin), answer(adapted))
    lightning_peft.switch(twin, "toy_shift", on=False)
    assert not torch.equal(answer(twin), answer(adapted)), "the copy has switches of its own"
    plain = pickle.loads(pickle.dumps(adapted))
    assert names(plain) == []
    torch.testing.assert_close(answer(plain), answer(adapted), atol=1e-6, rtol=0)


def saved(module, path, **settings):
    """Save a module through a Trainer that knows of no method."""
    runner = trainer(**settings)
    runner.validate(module, loader(8))
    runner.save_checkpoint(path)
    return path


@pytest.mark.parametrize("off", ["toy_low_rank", "toy_shift"])
@pytest.mark.parametrize("by", ["the same Trainer", "a Trainer without methods"])
def test_files_after_the_fit_are_ordinary_and_can_be_reopened(by, off, tmp_path) -> None:
    run = fit([kept(ToyShift()), kept(ToyLowRank()), ToyScale(targets=["model.0"])])
    lightning_peft.switch(run.module, off, on=False)
    path = tmp_path / "kept.ckpt"
    if by == "the same Trainer":
        run.trainer.save_checkpoint(path)
    else:
        saved(run.module, path)
    answered = answer(run.module)
    assert list(torch.load(path, weights_only=True)["state_dict"]) == list(Plain().state_dict())
    alone = Plain.load_from_checkpoint(path, weights_only=True)
    torch.testing.assert_close(answer(alone), answered, atol=1e-6, rtol=0)
    torch.testing.assert_close(answer(lightning_peft.load_from_checkpoint(Plain, path)), answered, atol=1e-6, rtol=0)
    if by == "the same Trainer":  # its file can be resumed, with ToyScale, so it holds what was trained under that
        return
    reopened = lightning_peft.load_from_checkpoint(Plain, path, attached=True)
    assert torch.equal(answer(reopened), answered)
    for module in (reopened, run.module):
        lightning_peft.switch(module, off)
    assert torch.equal(answer(reopened), answer(run.module))
    assert not torch.equal(answer(reopened), answered)
    again = saved(reopened, tmp_path / "again.ckpt")
    assert torch.equal(answer(lightning_peft.load_from_checkpoint(Plain, again, attached=True)), answer(reopened))


def test_a_map_that_left_from_beside_a_part_that_stays_is_in_the_file(tmp_path) -> None:
    run = fit([ToyScale(), kept(ToyLowRank())])
    answered = answer(run.module)
    run.trainer.save_checkpoint(tmp_path / "after.ckpt")
    path = tmp_path / "after.ckpt"
    for loaded in (Plain.load_from_checkpoint(path, weights_only=True), lightning_peft.load_from_checkpoint(Plain, path)):
        torch.testing.assert_close(answer(loaded), answered, atol=1e-6, rtol=0)
    reopened = lightning_peft.load_from_checkpoint(Plain, tmp_path / "after.ckpt", attached=True)
    assert sorted(set(names(reopened))) == ["toy_low_rank:toy_low_rank", "toy_scale:toy_scale"]
    torch.testing.assert_close(answer(reopened), answered, atol=1e-6, rtol=0)
    whole = fit([ToyScale(), kept(ToyLowRank())], max_epochs=2)
    resumed = fit([ToyScale(), kept(ToyLowRank())], seed=3, resume=tmp_path / "after.ckpt", max_epochs=2)
    torch.testing.assert_close(answer(resumed.module), answer(whole.module), atol=0, rtol=0)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_part_that_was_cut_with_its_layer_is_reopened(mapped, tmp_path) -> None:
    module = fit([kept(ToyLowRank()), *([kept(ToyScale())] if mapped else [])]).module
    run = fit([StructuredPruning(0.3, start=2)], module=module, max_epochs=2)
    assert module.model[0].out_features < 16
    path = tmp_path / "cut.ckpt"
    run.trainer.save_checkpoint(path)
    for attached in (False, True):
        loaded = lightning_peft.load_from_checkpoint(Plain, path, attached=attached)
        assert bool(attachments(loaded)) == attached
        torch.testing.assert_close(answer(loaded), answer(module), atol=1e-6, rtol=1e-6)


def test_a_file_without_methods_cannot_be_reopened(tmp_path) -> None:
    path = saved(fit([]).module, tmp_path / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match="Load it without attached=True"):
        lightning_peft.load_from_checkpoint(Plain, path, attached=True)
    lightning_peft.load_from_checkpoint(Plain, path)


def test_a_partial_file_is_reopened_on_its_base(tmp_path) -> None:
    class Frozen(Plain):
        def __init__(self, optimizer: str = "adam") -> None:
            torch.manual_seed(0)
            super().__init__(optimizer)
            self.model.requires_grad_(False)

    method = kept(ToyLowRank(targets=["model.0", "model.2", "model.4"]), checkpoint="trained")
    run = fit([method], style=Frozen, before=[], after=[ModelCheckpoint(tmp_path, filename="last")])
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "model.0.bias" not in held["state_dict"]
    reopened = lightning_peft.load_from_checkpoint(Frozen, tmp_path / "last.ckpt", attached=True)
    assert torch.equal(answer(reopened), answer(run.module))
    with lightning_peft.switch(reopened, "toy_low_rank", on=False):
        assert torch.equal(answer(reopened), answer(Frozen()))


def test_training_on_without_methods_resumes_bit_for_bit(adapted, tmp_path) -> None:
    whole = fit([], module=copy.deepcopy(adapted), max_epochs=2, seed=3)
    first = ModelCheckpoint(tmp_path, filename="first", save_top_k=-1)
    fit([], module=copy.deepcopy(adapted), after=[first, StopAfter()], max_epochs=2, seed=3)
    resumed = fit([], module=copy.deepcopy(adapted), max_epochs=2, seed=4, resume=tmp_path / "first.ckpt")
    for (name, one), (other, two) in zip(whole.module.named_parameters(), resumed.module.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(one, two), name
    trained = dict(whole.module.named_parameters())
    assert not any(torch.equal(tensor, trained[name]) for name, tensor in adapted.named_parameters())


def test_an_average_beside_what_stays(adapted, tmp_path) -> None:
    average = EMAWeightAveraging(decay=0.5)
    run = fit([ToyScale(), kept(ToyShift())], after=[average], max_epochs=2)
    path = tmp_path / "averaged.ckpt"
    answered = answer(run.module)
    run.trainer.save_checkpoint(path)
    assert names(run.module) == ["toy_shift:toy_shift"] * 3
    torch.testing.assert_close(answer(lightning_peft.load_from_checkpoint(Plain, path)), answered, atol=1e-6, rtol=0)
