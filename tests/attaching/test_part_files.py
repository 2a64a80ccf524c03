"""Layer parts after the fit: in files, in evaluations, in the next fit."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from part_toys import Adapters, Answers, AtStep, X, parts_of
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft
from lightning_peft.structure.checkpoint import KEY, CheckpointError
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.testing.toys import ToyEntropy, ToyLowRank, ToyScale, ToyShift
from lightning_peft.testing.trace import difference

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

INPUTS = DataLoader(TensorDataset(X), batch_size=len(X))


def test_what_went_into_the_weight_is_beside_it_again_for_an_evaluation():
    at = AtStep(4, lambda trainer, module: module(X))
    run = fit([ToyLowRank()], style=Answers, after=[at])
    before = copy.deepcopy(run.module.state_dict())
    trainer(callbacks=[ToyLowRank()]).test(run.module, loader(), verbose=False)
    assert torch.equal(run.module.answer, at.seen), "not with the part twice"
    assert difference(before, run.module.state_dict()) is None


@pytest.mark.filterwarnings("ignore:.*without the part:UserWarning")
def test_what_no_weight_does_comes_back_for_evaluation_and_the_next_fit(tmp_path):
    at = AtStep(4, lambda trainer, module: module(X))
    run = fit([Adapters()], style=Answers, after=[at, every_epoch(tmp_path)])
    assert not torch.allclose(run.module(X), at.seen, atol=1e-4), "after the fit the module is without the part"
    path = tmp_path / "epoch=0.ckpt"
    fresh = Answers()
    trainer(callbacks=[Adapters()]).test(fresh, loader(), ckpt_path=path, weights_only=True, verbose=False)
    assert torch.equal(fresh.answer, at.seen)
    before = copy.deepcopy(run.module.state_dict())
    trainer(callbacks=[Adapters()]).test(run.module, loader(), verbose=False)
    assert torch.equal(run.module.answer, at.seen), "what was stashed"
    assert difference(before, run.module.state_dict()) is None
    with pytest.raises(CheckpointError, match=r"'adapter' of Adapters on model\.0 .*Trainer\(callbacks=\[Adapters"):
        lightning_peft.load_from_checkpoint(Answers, path)


def test_a_switch_is_saved(tmp_path):
    class Off(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 2:
                next(iter(parts_of(pl_module).values())).enabled = False

    full = fit([ToyLowRank()], after=[Off(), every_epoch(tmp_path)], max_epochs=2)
    seen = AtStep(8, lambda trainer, module: [part.enabled for part in parts_of(module).values()])
    resumed = fit([ToyLowRank()], seed=7, after=[seen], resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert seen.seen == [False, True, True]
    assert_same(full, resumed, "a part that was switched off, uninterrupted against resumed")


def test_the_file_is_an_ordinary_one(tmp_path):
    at = AtStep(4, lambda trainer, module: module(X))
    fit([ToyLowRank()], after=[at, every_epoch(tmp_path)])
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Plain().state_dict())
    plain = Plain.load_from_checkpoint(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert torch.allclose(plain(X), at.seen, atol=1e-5), "without the library"
    assert set(checkpoint[KEY]["part_weights"]) == {"model.0.weight", "model.2.weight", "model.4.weight"}
    with_it = lightning_peft.load_from_checkpoint(Plain, tmp_path / "epoch=0.ckpt")
    assert difference(dict(with_it.state_dict()), dict(plain.state_dict())) is None


@pytest.mark.parametrize("when", ["in the fit", "after it"])
def test_the_file_is_an_ordinary_one_under_a_map_too(when, tmp_path):
    """Loaded by Lightning alone, baked, evaluated with other methods, resumed: the part goes into the weight once."""
    at = AtStep(4, lambda trainer, module: module(X))
    run = fit([ToyScale(), ToyLowRank()], after=[at, every_epoch(tmp_path)])
    path = tmp_path / "epoch=0.ckpt"
    if when == "after it":
        path = tmp_path / "after.ckpt"
        run.trainer.save_checkpoint(path)
    for loaded in (Plain.load_from_checkpoint(path, weights_only=True), lightning_peft.load_from_checkpoint(Plain, path)):
        assert torch.allclose(loaded(X), at.seen, atol=1e-5)
    for others in ([], [ToyShift()], [ToyScale()], [ToyLowRank()], [ToyScale(), ToyLowRank()]):
        module = Plain()
        runner = trainer(callbacks=others)
        answers = runner.predict(module, INPUTS, ckpt_path=path, weights_only=True)
        assert torch.allclose(answers[0], at.seen, atol=1e-5), others
    assert torch.load(path, weights_only=True)[KEY]["part_merged"] == ["model.0.weight", "model.2.weight", "model.4.weight"]
    whole = fit([ToyScale(), ToyLowRank()], max_epochs=2)
    assert_same(whole, fit([ToyScale(), ToyLowRank()], seed=3, resume=path, max_epochs=2), "resumed")


@pytest.mark.parametrize("mapped", [False, True])
def test_a_partial_file_does_without_the_weights_beside_parts(mapped, tmp_path):
    class Fixed(Plain):
        def __init__(self, optimizer="adam"):
            torch.manual_seed(0)
            super().__init__(optimizer)
            self.model.requires_grad_(False)

    def methods():
        adapter = ToyLowRank(targets=["model.0", "model.2", "model.4"])
        adapter.checkpoint = "trained"
        return [adapter, *([ToyShift(targets=["model.0"])] if mapped else [])]

    at = AtStep(4, lambda trainer, module: module(X))
    whole = fit(methods(), style=Fixed, after=[at, every_epoch(tmp_path)], max_epochs=2)
    path = tmp_path / "epoch=0.ckpt"
    held = torch.load(path, weights_only=True)
    expected = ["model.0.weight"] if mapped else []  # the toy's map moves what is stored when it comes
    assert [*held["state_dict"], *held[KEY]["part_weights"]] == expected
    assert_same(whole, fit(methods(), style=Fixed, seed=3, resume=path, max_epochs=2), "resumed from what was trained")
    assert torch.allclose(lightning_peft.load_from_checkpoint(Fixed, path)(X), at.seen, atol=1e-5)
    lightning_peft.bake_checkpoint(path, tmp_path / "baked.ckpt", base=Fixed())
    assert torch.allclose(Fixed.load_from_checkpoint(tmp_path / "baked.ckpt", weights_only=True)(X), at.seen, atol=1e-5)
    seen = trainer(callbacks=[ToyEntropy()]).predict(Fixed(), INPUTS, ckpt_path=path, weights_only=True)
    assert torch.allclose(seen[0], at.seen, atol=1e-5)


def test_another_set_of_parts_is_refused_for_a_fit_and_baked_for_a_test(tmp_path):
    fit([ToyLowRank()], after=[every_epoch(tmp_path)])
    path = tmp_path / "epoch=0.ckpt"
    with pytest.raises(CheckpointError, match=r"model\.4 had the part 'toy_low_rank' of toy_low_rank .* no part now"):
        fit([ToyLowRank(exclude=["model.4"])], resume=path, max_epochs=2)
    with pytest.raises(CheckpointError, match=r"down of the part 'toy_low_rank' .* on model\.0 does not fit.*\(2, 16\)"):
        fit([ToyLowRank(rank=3)], resume=path, max_epochs=2)
    module = Plain()
    trainer(callbacks=[ToyLowRank(exclude=["model.4"])]).validate(
        module, loader(), ckpt_path=path, weights_only=True, verbose=False
    )
    plain = Plain.load_from_checkpoint(path, weights_only=True)
    assert torch.allclose(module(X), plain(X), atol=1e-6)
