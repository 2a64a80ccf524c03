"""Masks that go on: resumed between choices, evaluated and baked from a checkpoint, equal on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from masked_weights import EVERYTHING, weights
from torch import Tensor

import lightning_peft
from lightning_peft import GBLM, MagnitudePruning, MaskedPruning
from lightning_peft.testing import run_ddp
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.runs import Fit, assert_same, fit


@pytest.mark.parametrize("start", [3, 4, 5, 6])
def test_resume_between_choices_is_bit_exact(start: int, tmp_path: Path) -> None:
    """The sums over gradients and inputs are half collected in the files of steps 4 and 8."""

    def method() -> MaskedPruning:
        return GBLM(0.6, exclude=EVERYTHING, start=start, end=10, every=3)

    whole: Fit = fit([method()], after=[every_epoch(tmp_path)], max_epochs=3)
    for epoch in (0, 1):
        path = tmp_path / f"epoch={epoch}.ckpt"
        sums = torch.load(path, weights_only=True)["callbacks"]["lightning_peft/gblm"]["state"]["seen"]
        assert any(seen["steps"] for seen in sums.values()) == ((4, 8)[epoch] not in (start, start + 3))
        assert_same(whole, fit([method()], resume=path, seed=9, max_epochs=3), f"resumed after epoch {epoch}")


def rank() -> dict[str, Tensor]:
    run = fit([GBLM(0.5, exclude=EVERYTHING, every=2)], devices=2, strategy="ddp", max_epochs=2)
    return {name: p.detach() for name, p in run.module.named_parameters()}


def test_ranks_choose_the_same() -> None:
    first, second = run_ddp(f"{__file__}:rank", {})
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum((p == 0).sum() for p in first.values()) > 0


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
def test_a_checkpoint_is_evaluated_as_trained_and_bakes(tmp_path: Path) -> None:
    fit([MagnitudePruning(0.7, exclude=EVERYTHING)], after=[every_epoch(tmp_path)], max_epochs=3)
    baked = lightning_peft.load_from_checkpoint(Plain, tmp_path / "epoch=2.ckpt")
    runner = trainer(callbacks=[MagnitudePruning(0.7, exclude=EVERYTHING)])
    live = runner.test(Plain(), loader(8), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    plain = trainer().test(baked, loader(8), verbose=False)
    assert live == plain
    zeros = sum(float((p == 0).sum()) for p in weights(baked))
    assert zeros == int(0.7 * sum(p.numel() for p in weights(baked)) + 1e-6)
