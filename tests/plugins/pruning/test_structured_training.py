"""Trainings with cuts go on bit for bit, with whatever optimizer and other methods; and what is refused."""

from __future__ import annotations

import builtins
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from structured_training import prune, twice
from torch import nn
from warm_python import python

import lightning_peft
from lightning_peft import PSKD, BlockPruning, MaskedPruning, NMSparsity, StructuredPruning, WeightCompander
from lightning_peft.structure.journal import journal_of
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Conv, Plain, deepened, loader, trainer
from lightning_peft.testing.runs import Fit, assert_same, fit

pytest.importorskip("torch_pruning")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def check_resume(make: Callable[[], list[Any]], folder: Path, averaged: bool = False, **settings: Any) -> Fit:
    """Train whole, then from every epoch's checkpoint: before, between and after cuts."""

    def before() -> list[Any]:
        return [EMAWeightAveraging(decay=0.5)] if averaged else []

    whole = prune(make(), after=[every_epoch(folder)], before=before(), **settings)
    assert len([edit for edit in journal_of(whole.module) if edit["op"] == "slice"]) == 2
    for epoch in range(2):
        resumed = prune(make(), seed=epoch + 9, resume=folder / f"epoch={epoch}.ckpt", before=before(), **settings)
        assert_same(whole, resumed, f"uninterrupted against resumed after epoch {epoch}")
    return whole


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer: str, tmp_path: Path) -> None:
    class Optimized(Conv):
        def configure_optimizers(self) -> Any:
            return OPTIMIZERS[optimizer](self.parameters())

    check_resume(lambda: [twice()], tmp_path, style=Optimized)


def test_with_masks_maps_losses_and_averages(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        masks = MaskedPruning(0.3, "taylor", exclude=(), targets="all-conv", start=3, every=1)
        return [NMSparsity("2:4", targets="all-linear", exclude=()), masks, WeightCompander(), PSKD(), twice("taylor")]

    whole = check_resume(methods, tmp_path, averaged=True)
    loaded = lightning_peft.load_from_checkpoint(Conv, tmp_path / "epoch=2.ckpt")
    assert loaded.state_dict().keys() == whole.module.state_dict().keys()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
def test_half_of_the_parameters_are_gone_and_a_plain_module_is_left(tmp_path: Path) -> None:
    before = sum(parameter.numel() for parameter in Conv().parameters())
    run = prune([twice()], after=[every_epoch(tmp_path)])
    after = sum(parameter.numel() for parameter in run.module.parameters())
    assert 0.4 * before < after <= 0.5 * before
    convs = [layer for layer in run.module.modules() if isinstance(layer, nn.Conv2d)]
    assert all(layer.weight.shape[:2] == (layer.out_channels, layer.in_channels) for layer in convs)
    moments = run.trainer.optimizers[0].state
    assert all(moments[p]["exp_avg"].shape == p.shape for p in run.module.parameters())
    inputs = torch.randn(4, 16)
    for name in ("epoch=2.ckpt", "after.ckpt", "baked.ckpt"):
        if name == "after.ckpt":
            run.trainer.save_checkpoint(tmp_path / name, weights_only=True)
        if name == "baked.ckpt":
            lightning_peft.bake_checkpoint(tmp_path / "epoch=2.ckpt", tmp_path / name)
        loaded = lightning_peft.load_from_checkpoint(Conv, tmp_path / name)
        assert torch.equal(loaded.eval()(inputs), run.module.eval()(inputs)), name
    runner = trainer(callbacks=[twice()])
    runner.test(Conv(), loader(8), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    first = copy.deepcopy(run.module)
    trainer(callbacks=[twice()]).test(run.module, loader(8), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert sum(parameter.numel() for parameter in run.module.parameters()) == before  # grown back
    assert sum(parameter.numel() for parameter in first.parameters()) == after


def test_killed_in_the_middle_of_a_cut(tmp_path: Path) -> None:
    code = f"from structured_training import train_killed; train_killed({str(tmp_path)!r}, at=6)"
    done = python("-c", code, cwd=Path(__file__).parent)
    assert done.returncode == -9, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]
    resumed = prune([twice("taylor")], seed=3, resume=tmp_path / "epoch=0.ckpt")
    assert_same(prune([twice("taylor")]), resumed, "uninterrupted against killed and resumed")


def test_the_short_trainings_of_the_tester_are_cut() -> None:
    run = fit([StructuredPruning(0.4, start="60%")], style=Plain)
    assert [edit["step"] for edit in journal_of(run.module)] == [2]


def test_a_frozen_layer_and_excluded_outputs_stay() -> None:
    class Frozen(Conv):
        def build(self) -> None:
            super().build()
            self.model[1].requires_grad_(False)

    run = prune([StructuredPruning(0.2, "taylor", start=6, exclude=["model.1"])], style=Frozen)
    assert run.module.model[1].out_channels == 8
    assert journal_of(run.module)


@pytest.mark.parametrize("score", ["taylor", "magnitude"])
def test_frozen_layers_keep_their_outputs_unless_they_are_named(score: str) -> None:
    class Frozen(Conv):
        def build(self) -> None:
            super().build()
            self.model[1].requires_grad_(False)
            self.model[1].weight.data.mul_(1e-3)  # by its magnitude it would go first

    assert "leaves 1 frozen alone (model.1)" in str(lightning_peft.plan(Frozen(), [StructuredPruning(0.2)]))
    for arguments in ({}, {"targets": "all-weights"}, {"exclude": nn.Linear}):
        run = prune([StructuredPruning(0.2, score, start=6, **arguments)], style=Frozen)
        assert run.module.model[1].out_channels == 8
        assert journal_of(run.module)
    run = prune([StructuredPruning(0.2, score, start=6, targets=["all-weights", "model.1"])], style=Frozen)
    assert run.module.model[1].out_channels < 8


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"amount": 0.0}, "share of the cost"),
        ({"amount": 1.5}, "share of the cost"),
        ({"score": "taylr"}, "score='taylr'.*taylor"),
        ({"of": "money"}, "of='money' is unknown"),
        ({"what": "layers"}, "what='layers' is unknown"),
        ({"what": []}, "what= is empty"),
        ({"scope": "row"}, "scope='row' is unknown"),
        ({"round_to": 0}, "round_to=0"),
        ({"min_kept": 1.0}, "min_kept=1.0"),
        ({"optimizer_state": "copy"}, "optimizer_state='copy'"),
    ]
    for arguments, message in cases:
        with pytest.raises(MisconfigurationException, match=message):
            StructuredPruning(**arguments)
    module = Plain()
    with pytest.raises(MisconfigurationException, match="cannot be removed: at most"):
        fit([StructuredPruning(0.9, min_kept=0.5, start=3)], module=module)
    assert journal_of(module) == []
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch_pruning":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MisconfigurationException, match=r"pip install lightning-peft\[prune\]"):
        fit([StructuredPruning(start=2)])


def test_a_network_that_is_not_called_is_refused() -> None:
    class Aside(Plain):
        def build(self) -> None:
            super().build()
            self.unused = nn.Linear(4, 4)

    with pytest.raises(MisconfigurationException, match="was not called in training before step 2"):
        fit([StructuredPruning(start=2, network="unused")], style=Aside)
    with pytest.raises(MisconfigurationException, match=r"unused did not contribute.*exclude=\['unused'\]"):
        fit([StructuredPruning(start=2, network="")], style=Aside)


def test_channels_and_blocks_leave_in_one_training_after_the_other() -> None:
    style = deepened(Conv)
    both = [StructuredPruning(0.3, start=2), BlockPruning(1, start=2, every=1)]
    message = "block_pruning and structured_pruning both change the structure .* Train with one of them first"
    with pytest.raises(MisconfigurationException, match=message):
        lightning_peft.plan(style(), both)
    with pytest.raises(MisconfigurationException, match=message):
        fit(both, style=style)
    module = fit([both[1]], style=style).module
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "structured_pruning leaves whole")
        fit([both[0]], module=module)
    assert [edit["op"] for edit in journal_of(module)] == ["blocks", "slice"]
