"""Weights that shrink before they are pruned: soft shrinkage and growing decay against the same steps by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from masked_weights import EVERYTHING
from torch import Tensor

from lightning_peft import ISSP, GroupEnvelope, MaskedPruning
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, TwoOptimizers, loader, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.weights.maps import mapped_tensors

SGD: Any = {"optimizer": "sgd", "tolerance": 1e-6}


def smallest_halves(weights: Iterable[Tensor]) -> list[Tensor]:
    """Ones where the magnitude is among the lower half of its layer, zeros elsewhere."""
    orders = [(weight, weight.detach().abs().flatten().argsort(stable=True)) for weight in weights]
    return [
        torch.zeros(weight.numel()).index_fill(0, order[: len(order) // 2], 1.0).view_as(weight) for weight, order in orders
    ]


def shrinkage(task: Task, alpha: float) -> list[float]:
    """The official step of soft shrinkage: the smallest half of each layer times alpha after each step, zero from step 8 on."""
    weights, losses = [p for p in task.module.parameters() if p.ndim > 1], []
    for step, batch in enumerate(task.batches, start=1):
        loss = task.loss(batch)
        task.step(loss)
        losses.append(loss.item())
        if step <= 8:
            smallest = smallest_halves(weights)
        for weight, low in zip(weights, smallest, strict=True):
            weight.data *= 1 - low * (1 - alpha if step < 8 else 1)
    return losses


def growing_decay(task: Task) -> list[float]:
    """Growing regularisation: half of each layer is chosen at the start, its penalty grows for 9 steps, then it is zero."""
    weights, losses = [p for p in task.module.parameters() if p.ndim > 1], []
    smallest = smallest_halves(weights)
    for step, batch in enumerate(task.batches):
        task.optimizer.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        for weight, low in zip(weights, smallest, strict=True):
            weight.grad += low * (5.0 * step / 9 * weight.detach() if step < 9 else -weight.grad)
        task.optimizer.step()
        for weight, low in zip(weights, smallest, strict=True):
            weight.data *= 1 - low if step + 1 >= 9 else 1
        losses.append(loss.item())
    return losses


def decayed() -> MaskedPruning:
    rule: Any = {"rule": "decay", "strength": 5.0, "shape": "constant", "every": 100, "scope": "layer"}
    return MaskedPruning(0.5, exclude=EVERYTHING, end=9, **rule)


class TestShrinkage(MethodTester):
    methods = [
        lambda: ISSP(0.6, exclude=EVERYTHING),
        lambda: GroupEnvelope(0.5, strength=1.0, pattern="block:4x4", exclude=EVERYTHING, end="50%"),
        lambda: MaskedPruning(0.5, exclude=EVERYTHING, end="70%", every=3, rule="decay", strength=2.0),
    ]
    # By SGD without momentum: the official code lets pruned weights be moved by it and zeroes them after each step.
    references = [
        *(
            Reference(partial(shrinkage, alpha=a), partial(ISSP, 0.5, alpha=a, exclude=EVERYTHING, end=8, start=1), **SGD)
            for a in (0.95, 1.0, 0.0)
        ),
        Reference(growing_decay, decayed, **SGD),
    ]
    no_exact_bake = "while weights shrink, the module computes with them; what it bakes is without them"


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
