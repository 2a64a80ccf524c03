"""Gradients that a method has computed once more, beside the same written by hand in plain torch."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from step_toys import RADIUS, SGD, Dropout, SGDBatchNorm, batches, by_hand, loss_of, same, seeded
from torch.nn import functional as F

from lightning_peft.testing.modules import loader
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy, ToySAM


def test_the_second_evaluation_leaves_statistics_alone():
    run = fit([ToySAM(RADIUS)], module=seeded(SGDBatchNorm), max_epochs=2)
    same(by_hand(seeded(SGDBatchNorm), batches()), run, "statistics")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_dropout_drops_the_same_once_more(accumulate):
    hand = by_hand(seeded(Dropout), batches(1)[: 2 * accumulate], accumulate=accumulate)
    run = fit([ToySAM(RADIUS)], module=seeded(Dropout), limit_train_batches=2 * accumulate, accumulate_grad_batches=accumulate)
    same(hand, run, "dropout")


@pytest.mark.parametrize("samples", [24, 32])
def test_sam_under_accumulation(samples):
    windows = [*loader(samples, 4)] * 2
    run = fit([ToySAM(RADIUS)], module=seeded(SGD), data=loader(samples, 4), max_epochs=2, accumulate_grad_batches=samples // 8)
    same(by_hand(seeded(SGD), windows, accumulate=samples // 8), run, f"windows of {samples // 8} batches")


def test_the_last_window_of_an_epoch_may_be_shorter():
    def halved(module, batch):
        return loss_of(module, batch) / (2 if batch is last else 1)  # Lightning divides by 2 there too

    data = [*loader(24, 8)]
    last = data[-1]
    hand = by_hand(seeded(SGD), data, accumulate=2, loss_of=halved)
    run = fit([ToySAM(RADIUS)], module=seeded(SGD), data=loader(24, 8), accumulate_grad_batches=2)
    same(hand, run, "windows of 2 and 1")


def test_sam_with_clipping():
    run = fit([ToySAM(RADIUS)], module=seeded(SGD), max_epochs=2, gradient_clip_val=0.1)
    same(by_hand(seeded(SGD), batches(), clip=0.1), run, "clipped")


def test_sam_in_bf16():
    run = fit([ToySAM(RADIUS)], module=seeded(SGD), max_epochs=2, precision="bf16-mixed")
    hand = by_hand(seeded(SGD), batches(), context=lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    same(hand, run, "bf16-mixed")


@pytest.mark.parametrize("start", [2.0**10, 2.0**22], ids=["scaled", "skips"])
def test_sam_with_a_gradient_scaler(start):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=start, growth_interval=2)

    seen = []

    class Scaled(ToySAM):
        def compute_gradients(self, run, optimizer, closure):
            seen.append(closure.scale)
            super().compute_gradients(run, optimizer, closure)

    method = Scaled(RADIUS)
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    run = fit([method], module=seeded(SGD), max_epochs=3, plugins=[plugin], gradient_clip_val=0.5)
    context = partial(torch.autocast, "cpu", torch.half, cache_enabled=False)
    same(by_hand(seeded(SGD), batches(3), context=context, scaler=scaler(), clip=0.5), run, "16-mixed")
    assert seen[0] == start
    skipped = sum(after < before for before, after in itertools.pairwise([*seen, plugin.scaler.get_scale()]))
    assert method.steps == 12 - skipped
    assert (skipped > 0) == (start > 2.0**20)


def test_statistics_are_updated_twice_only_if_asked():
    class Twice(ToySAM):
        def compute_gradients(self, run, optimizer, closure):
            again = closure.again
            closure.again = lambda: again(statistics=True)
            super().compute_gradients(run, optimizer, closure)

    run = fit([Twice(RADIUS)], module=seeded(SGDBatchNorm), max_epochs=2)
    same(by_hand(seeded(SGDBatchNorm), batches(), statistics=True), run, "statistics=True")
    assert run.module.model[1].num_batches_tracked == 16


def test_terms_of_methods_are_part_of_both_evaluations():
    def with_term(module, batch):
        logits = module.logits(batch[0])
        return F.cross_entropy(logits, batch[1]) + 0.1 * (1 - logits.softmax(-1).square().sum(-1)).mean()

    run = fit([ToySAM(RADIUS), ToyEntropy()], module=seeded(SGD), max_epochs=2, accumulate_grad_batches=2)
    same(by_hand(seeded(SGD), batches(), accumulate=2, loss_of=with_term), run, "with a term")
