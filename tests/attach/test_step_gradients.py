"""Gradients that a method has computed once more, beside the same written by hand in plain torch."""

from __future__ import annotations

import copy
import itertools
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft import Lane, Method, Resource, apply_terms
from lightning_peft.compose.loss import NonFiniteLossError
from lightning_peft.testing import run_ddp
from lightning_peft.testing.modules import BatchNorm, DictOutput, Manual, Plain, TwoOptimizers, loader, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy, ToyNoise, ToySAM, ToyScale, ToyTwice, with_gradient
from lightning_peft.testing.trace import difference

RADIUS = 0.3


class SGD(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Dropout(SGD):
    def build(self):
        super().build()
        self.model.insert(2, nn.Dropout(0.4))

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            torch.manual_seed(batch_idx)


class SGDBatchNorm(SGD):
    build = BatchNorm.build


def seeded(style):
    torch.manual_seed(0)
    return style()


def loss_of(module, batch):
    return F.cross_entropy(module.logits(batch[0]), batch[1])


def backward(module, window, loss_of, context, scaler, states=None):
    """Backward passes of a window, and the states of the generator before each of them."""
    drawn = []
    for place, batch in enumerate(window):
        drawn.append(torch.get_rng_state())
        if states is not None:
            torch.set_rng_state(states[place])
        with context():
            loss = loss_of(module, batch) / len(window)
        (loss if scaler is None else scaler.scale(loss)).backward()
    return drawn


def climb(module, parameters, norm, evaluate, statistics):
    before = [p.detach().clone() for p in parameters]
    buffers, now = copy.deepcopy(list(module.buffers())), torch.get_rng_state()
    with torch.no_grad():
        for p in parameters:
            p.add_(p.grad * (RADIUS / norm))
            p.grad = None
    evaluate()
    torch.set_rng_state(now)
    with torch.no_grad():
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
        if not statistics:
            for buffer, value in zip(module.buffers(), buffers, strict=True):
                buffer.copy_(value)


def by_hand(module, batches, *, accumulate=1, clip=None, context=nullcontext, scaler=None, statistics=False, loss_of=loss_of):
    """Sharpness-aware minimisation of a module by SGD, as one writes it without any library."""
    module.train()
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for start in range(0, len(batches), accumulate):
        torch.manual_seed(start)
        window = batches[start : start + accumulate]
        optimizer.zero_grad()
        states = backward(module, window, loss_of, context, scaler)
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        if norm.isfinite():
            again = partial(backward, module, window, loss_of, context, scaler, states)
            climb(module, parameters, norm, again, statistics)
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        scaler.step(optimizer)
        scaler.update()
    return module


def batches(epochs=2, batch_size=8):
    return [*loader(32, batch_size)] * epochs


def same(hand, run, what):
    found = difference(dict(hand.state_dict()), dict(run.module.state_dict()))
    assert found is None, f"{what}: by hand against the method: {found}"


@pytest.mark.parametrize("style", [SGD, SGDBatchNorm])
def test_sam_is_sam(style):
    run = fit([ToySAM(RADIUS)], module=seeded(style), max_epochs=2)
    same(by_hand(seeded(style), batches()), run, style.__name__)
    plain = fit([], module=seeded(style), max_epochs=2)
    assert difference(dict(plain.module.state_dict()), dict(run.module.state_dict())) is not None


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


def test_batches_are_told_apart_when_they_come_again():
    class Watches(ToyEntropy):
        def loss(self, step):
            seen.append((step.repeated, step.batch_idx, step.sample_index.tolist(), step.batch[0][0, 0].item()))
            return super().loss(step)

    seen = []
    fit([ToySAM(), Watches()], data=loader(24, 8), accumulate_grad_batches=2)
    inputs = [batch[0][0, 0].item() for batch in loader(24, 8)]
    first, second, third = ((i, [*range(8 * i, 8 * i + 8)], inputs[i]) for i in range(3))
    order = [(False, first), (False, second), (True, first), (True, second), (False, third), (True, third)]
    assert seen == [(repeated, *which) for repeated, which in order]


# What an evaluation once more must not leave.


class Notes(DictOutput):
    def build(self):
        super().build()
        self.model.insert(2, nn.Dropout(0.2))
        self.accuracy = MulticlassAccuracy(3)
        self.logged = 0

    def base_loss(self, batch):
        self.accuracy(self.logits(batch[0]), batch[1])
        return super().base_loss(batch)

    def log(self, *args, **kwargs):
        self.logged += 1
        super().log(*args, **kwargs)


class Backwards(Callback):
    def __init__(self):
        self.seen = 0

    def on_after_backward(self, *args):
        self.seen += 1


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_a_step_evaluated_twice_leaves_what_one_does(settings):
    def trained(*extra):
        counts = Backwards()
        run = fit(
            [ToyEntropy(), ToyScale(), *extra], style=Notes, after=[counts], max_epochs=2, log_every_n_steps=1, **settings
        )
        logged = {name: float(value) for name, value in run.trainer.logged_metrics.items()}
        counted = run.module.accuracy.compute().item(), run.module.accuracy._update_count
        return logged, counted, run.module.logged, counts.seen, dict(run.module.state_dict()), torch.rand(3)

    assert difference(trained(), trained(ToyTwice())) is None


def test_the_losses_logged_are_those_at_the_weights():
    run = fit([ToySAM(RADIUS), ToyEntropy()], style=DictOutput, log_every_n_steps=1, limit_val_batches=0)
    logged = run.trainer.logged_metrics
    assert logged["peft/loss/base"] == logged["loss"]
    assert logged["peft/loss/total"] == logged["peft/loss/base"] + logged["peft/loss/toy_entropy"]


def test_a_loss_that_is_not_finite_elsewhere_leaves_the_weights():
    class Cliff(SGD):
        def base_loss(self, batch):
            changed = not torch.equal(self.model[0].weight, self.held)
            return super().base_loss(batch) * (math.nan if changed else 1.0)

    module = seeded(Cliff)
    module.held = module.model[0].weight.detach().clone()
    with pytest.raises(NonFiniteLossError):
        fit([ToySAM()], module=module)
    assert torch.equal(module.model[0].weight, module.held)


def test_nothing_is_installed_when_nobody_asks():
    class Looks(Callback):
        def on_train_batch_start(self, trainer, module, *args):
            names = {"optimizer_step", "backward"} & set(vars(trainer.strategy))
            names |= {"configure_gradient_clipping"} & set(vars(module))
            seen.append(names)

        on_train_end = on_train_batch_start

    seen = []
    fit([ToyEntropy()], after=[Looks()])
    assert not any(seen)
    run = fit([ToySAM()], after=[Looks()])
    assert seen[-1] == {"optimizer_step"}
    assert not {"optimizer_step", "backward"} & set(vars(run.trainer.strategy))


# By hand.


class Closures(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        classifier, generator = self.optimizers()

        def classify():
            classifier.zero_grad()
            loss = apply_terms(self, self.base_loss(batch))
            self.manual_backward(loss)
            return loss

        def generate():
            generator.zero_grad()
            loss = self.model(self.generator(batch[0][:, :4]))[:, 0].mean()
            self.manual_backward(loss)
            return loss

        classifier.step(closure=classify)
        generator.step(closure=generate)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.model, self.generator)]


def test_sam_of_two_optimizers_by_hand():
    hand = seeded(Closures)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (hand.model, hand.generator)]
    losses = [loss_of, lambda module, batch: module.model(module.generator(batch[0][:, :4]))[:, 0].mean()]
    for batch in batches():
        for optimizer, loss in zip(optimizers, losses, strict=True):
            parameters = optimizer.param_groups[0]["params"]
            optimizer.zero_grad()
            loss(hand, batch).backward()
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            before = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p in parameters:
                    p.add_(p.grad * (RADIUS / norm))
            optimizer.zero_grad()
            loss(hand, batch).backward()
            with torch.no_grad():
                for p, value in zip(parameters, before, strict=True):
                    p.copy_(value)
            optimizer.step()
    run = fit([ToySAM(RADIUS)], module=seeded(Closures), max_epochs=2)
    same(hand, run, "two optimizers")


def test_a_step_by_hand_evaluated_twice_leaves_what_one_does():
    def trained(*extra):
        counts = Backwards()
        run = fit([ToyEntropy(), *extra], style=Closures, after=[counts], max_epochs=2)
        return counts.seen, run.methods[0].state(), dict(run.module.state_dict())

    assert difference(trained(), trained(ToyTwice())) is None


class Adds(Closures):
    """Accumulates two batches by hand, of which a closure knows the last alone."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[0]
        if batch_idx % 2 == 0:
            self.manual_backward(apply_terms(self, self.base_loss(batch)))
        else:
            optimizer.step(closure=lambda: self.manual_backward(apply_terms(self, self.base_loss(batch))))
            optimizer.zero_grad()


@pytest.mark.parametrize(("style", "message"), [(Manual, "got no closure"), (Adds, "adds to the gradients of the last call")])
def test_what_cannot_be_computed_again_is_refused(style, message):
    with pytest.raises(MisconfigurationException, match=rf"{message}.*toy_sam|toy_sam.*{message}.*optimizer.zero_grad\(\)"):
        fit([ToySAM()], style=style)
    fit([ToyNoise()], style=style)  # which needs no second evaluation


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_fetches_its_batches_is_refused():
    class Fetches(Plain):
        def training_step(self, dataloader_iter):
            return self.base_loss(next(dataloader_iter)[0])

    with pytest.raises(MisconfigurationException, match="Let training_step take the batch"):
        fit([ToySAM()], style=Fetches)


# Several methods, several ranks.


class Doubles(Method):
    """Gradients twice as large, a loss twice as large."""

    lane = Lane.GRADIENT
    writes = frozenset({Resource.GRADIENT})

    def compute_gradients(self, run, optimizer, closure):
        closure()
        for parameter in with_gradient(optimizer):
            parameter.grad.mul_(2.0)


@pytest.mark.parametrize("first", ["doubles", "toy_sam"])
def test_a_later_method_has_the_earlier_one_within_its_closure(first):
    calls = []

    class Doubling(Doubles):
        def compute_gradients(self, run, optimizer, closure):
            calls.append("doubles")
            super().compute_gradients(run, optimizer, closure)

    pair = {"doubles": Doubling(name="doubles"), "toy_sam": ToySAM(RADIUS)}
    last = next(name for name in pair if name != first)
    pair[last].after = (first,)
    counts = Backwards()
    run = fit(pair.values(), module=seeded(SGD), max_epochs=1, after=[counts])
    assert counts.seen == 4, "what is computed once more is no second step"
    assert len(calls) == (8 if first == "doubles" else 4)
    hand = by_hand(seeded(SGD), batches(1), loss_of=lambda module, batch: 2.0 * loss_of(module, batch))
    error = max((p - q).abs().max().item() for p, q in zip(hand.parameters(), run.module.parameters(), strict=True))
    assert error < 1e-5


class Sees(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append(batch)


def on_rank(accumulate):
    torch.set_num_threads(1)
    module, method, sees = seeded(SGDBatchNorm), ToySAM(RADIUS), Sees()
    callbacks = [method, ToyTwice(), sees]
    settings = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "accumulate_grad_batches": accumulate}
    trainer(callbacks=callbacks, **settings).fit(module, loader(32, 4))
    return {"weights": dict(module.state_dict()), "steps": method.steps, "batches": sees.batches}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_take_the_step_of_one(accumulate):
    first, second = run_ddp(f"{__file__}:on_rank", {"accumulate": accumulate})
    trained = {name for name, _ in seeded(SGDBatchNorm).named_parameters()}
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in trained)
    pairs = [*zip(first["batches"], second["batches"], strict=True)]

    def mean_of_ranks(module, pair):
        return sum(loss_of(module, batch) for batch in pair) / 2

    hand = by_hand(seeded(SGDBatchNorm), pairs, accumulate=accumulate, loss_of=mean_of_ranks)
    error = max((hand.state_dict()[name] - first["weights"][name]).abs().max().item() for name in trained)
    assert error < 1e-5
    assert first["steps"] == 8 // accumulate
