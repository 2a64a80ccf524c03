"""Weights that shrink before they are pruned: soft shrinkage and growing decay against the same steps by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from masked_weights import EVERYTHING, pruned
from torch import Tensor

from lightning_peft import ISSP, GroupEnvelope, MaskedPruning
from lightning_peft.testing import MethodTester
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, TwoOptimizers, loader, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.weights.maps import mapped_tensors


class TestShrinkage(MethodTester):
    methods = [
        lambda: ISSP(0.6, exclude=EVERYTHING),
        lambda: GroupEnvelope(0.5, strength=1.0, pattern="block:4x4", exclude=EVERYTHING, end="50%"),
        lambda: MaskedPruning(0.5, exclude=EVERYTHING, end="70%", every=3, rule="decay", strength=2.0),
    ]
    no_exact_bake = "while weights shrink, the module computes with them; what it bakes is without them"


class Shrinkage(Callback):
    """The step of the official code after every optimizer step: the smallest half of each layer times alpha, then zero."""

    def __init__(self, alpha: float, end: int) -> None:
        self.alpha, self.end = alpha, end
        self.masks: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for name, weight in pl_module.named_parameters():
            if weight.ndim < 2:
                continue
            if trainer.global_step <= self.end:
                order = weight.abs().flatten().argsort(stable=True)
                self.masks[name] = torch.ones(weight.numel(), dtype=torch.bool)
                self.masks[name][order[: weight.numel() // 2]] = False
            factor = self.alpha if trainer.global_step < self.end else 0.0
            weight.mul_(torch.where(self.masks[name].view_as(weight), 1.0, factor))


@pytest.mark.parametrize("alpha", [0.95, 1.0, 0.0])
def test_iterative_soft_shrinkage_step_by_step(alpha: float) -> None:
    style = sgd_without_momentum()  # the official code lets pruned weights be moved by momentum and zeroes them after each step
    mine = fit([ISSP(0.5, alpha=alpha, exclude=EVERYTHING, end=8, start=1)], style=style, max_epochs=3)
    theirs = fit([], after=[Shrinkage(alpha, end=8)], style=style, max_epochs=3)
    torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-5, atol=1e-6)
    assert set(pruned(mine.module).values()) == {0.5}


class GrowingDecay(Callback):
    """The gradient of growing regularisation: half of each layer is chosen at the start, its penalty grows."""

    def __init__(self, strength: float, end: int) -> None:
        self.strength, self.end = strength, end
        self.kept: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for name, weight in pl_module.named_parameters():
            if weight.ndim > 1:
                order = weight.detach().abs().flatten().argsort(stable=True)
                kept = torch.ones(weight.numel(), dtype=torch.bool)
                kept[order[: weight.numel() // 2]] = False
                self.kept[name] = kept.view_as(weight)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, kept in self.kept.items():
            weight = pl_module.get_parameter(name)
            if trainer.global_step < self.end:
                weight.grad += (~kept) * self.strength * trainer.global_step / self.end * weight
            else:
                weight.grad *= kept

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step >= self.end:
            for name, kept in self.kept.items():
                pl_module.get_parameter(name).mul_(kept)


def test_growing_decay_step_by_step() -> None:
    style = sgd_without_momentum()
    rule = {"rule": "decay", "strength": 5.0, "shape": "constant", "every": 100, "scope": "layer"}
    once = GrowingDecay(5.0, end=9)
    theirs = fit([], after=[once], style=style, max_epochs=3)
    mine = fit([MaskedPruning(0.5, exclude=EVERYTHING, end=9, **rule)], style=style, max_epochs=3)  # type: ignore[arg-type]
    torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-5, atol=1e-6)
    assert set(pruned(mine.module).values()) == {0.5}
    for name, kept in once.kept.items():
        assert torch.equal(mine.module.get_parameter(name) != 0, kept), "what had decayed was what the last choice pruned"


def sgd_without_momentum() -> type[Plain]:
    class Descent(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Descent


def test_a_checkpoint_from_the_middle_of_shrinkage_is_evaluated_as_trained(tmp_path: Path) -> None:
    fit([ISSP(0.5, exclude=EVERYTHING, end=10)], after=[every_epoch(tmp_path)], max_epochs=3)
    for epoch, masked in ((0, False), (2, True)):
        method, module = ISSP(0.5, exclude=EVERYTHING, end=10), Plain()
        seen: list[float] = []

        class Look(Callback):
            def on_test_start(self, trainer: Any, pl_module: Any, seen: list[float] = seen) -> None:
                seen += [float((m.layer.weight == 0).float().mean()) for m in mapped_tensors(pl_module)]  # type: ignore[union-attr,arg-type]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the ModelCheckpoint that is not here
            trainer(callbacks=[method, Look()]).test(
                module, loader(8), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False, weights_only=True
            )
        assert set(seen) == ({0.5} if masked else {0.0})


def test_a_step_of_two_optimizers_shrinks_once() -> None:
    class Stored(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.before = {mapped.name: mapped.stored.detach().clone() for mapped in mapped_tensors(pl_module)}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.after = {mapped.name: mapped.stored.detach().clone() for mapped in mapped_tensors(pl_module)}

    stored = Stored()
    still = TwoOptimizers("sgd", lr=0.0)
    shrinks = ISSP(0.5, alpha=0.5, exclude=EVERYTHING, end="100%")
    fit([shrinks], module=still, after=[stored], max_epochs=1, limit_train_batches=2)
    for name, before in stored.before.items():
        assert set((stored.after[name] / before).flatten().tolist()) == {1.0, 0.5}, name
