"""Hooks are called for every method that overrides them, in an order that is known, or the plan says why not."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn

import lightning_peft_plugins
from lightning_peft import Lane, Method, Resource, plan, registry
from lightning_peft.attaching.hook_checks import ConflictError, check_hooks
from lightning_peft.contract import Contract
from lightning_peft.testing.modules import Manual, Plain, loader, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy, ToyLookahead, ToyNoise, ToySAM, ToyScale
from lightning_peft.testing.trace import difference

METHODS = [entry.load() for entry in registry.installed().values()]


# Every loss counts.


class RegularisedScale(ToyScale):
    """A map and a term in one method."""

    def loss(self, step):
        called.append(self.name)
        return 0.25 * step.base_loss.detach()


called: list[str] = []


@pytest.mark.parametrize("lane", [lane for lane in Lane if lane not in (Lane.STRUCTURE, Lane.REPARAM)])
def test_the_loss_of_a_method_in_any_lane_is_called(lane):
    called.clear()
    both = [type("Late", (RegularisedScale,), {"lane": lane, "writes": frozenset()})(targets="model.0"), RegularisedScale()]
    both[1].exclude = "model.0"
    run = fit(both, log_every_n_steps=1)
    assert called == ["regularised_scale", "late"] * 4
    base, total = (float(run.trainer.callback_metrics[f"peft/loss/{name}"]) for name in ("base", "total"))
    assert total == pytest.approx(1.5 * base)


def test_a_term_of_another_lane_asks_for_apply_terms_too():
    class NeverAsks(Manual):
        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(self.base_loss(batch))

    with pytest.raises(MisconfigurationException, match="so regularised_scale cannot reach its loss"):
        fit([RegularisedScale()], style=NeverAsks)


# No hook is overridden in vain.


@pytest.mark.parametrize(
    ("hook", "lane"), [("adapt", Lane.ADAPT), ("next_edit", Lane.STRUCTURE), ("first_edit", Lane.STRUCTURE)]
)
def test_a_hook_that_the_lane_never_gets_is_refused(hook, lane):
    def kind(of):
        return type("Wrong", (Method,), {"lane": of, hook: lambda self, *args: None})()

    for other in Lane:
        if other != lane:
            with pytest.raises(MisconfigurationException, match=rf"Wrong overrides {hook}\(\).*lane = Lane\.{lane.name}, or"):
                plan(Plain(), [kind(other)])
    plan(Plain(), [kind(lane)])  # what the message says


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_no_shipped_method_reaches_round_the_contract(method):
    """What Lightning calls goes to the hub; a method that overrides it runs in the order of the callbacks list."""
    check_hooks(method.__new__(method))
    hooks = {name for name, _ in inspect.getmembers(Callback, inspect.isfunction) if not name.startswith("_")}
    for base in method.__mro__[: method.__mro__.index(Method)]:
        taken = hooks & set(vars(base)) - set(vars(Contract))
        assert not taken, f"{base.__name__} overrides {taken}"


def test_no_plugin_names_the_hub():
    sources = Path(*lightning_peft_plugins.__path__).rglob("*.py")
    assert not [path for path in sources if re.search(r"\b_hub\b", path.read_text(encoding="utf-8"))]


# Gradients.


def project(gradient):
    return gradient - gradient.mean()


class Project(Method):
    """Takes the mean out of every gradient, and so does not commute with noise."""

    lane, writes = Lane.GRADIENT, frozenset({Resource.GRADIENT})

    def before_step(self, run, optimizer):
        for parameter in run.module.parameters():
            parameter.grad.copy_(project(parameter.grad))


def by_hand(order, clip=None):
    torch.manual_seed(0)
    module = Plain()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    for step, batch in enumerate(loader()):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            noise = 0.01 * torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad
            parameter.grad = project(gradient + noise) if order == "noise first" else project(gradient) + noise
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return dict(module.state_dict())


@pytest.mark.parametrize(("noise", "projection"), [("a", "b"), ("b", "a")])
def test_two_writers_of_gradients_are_not_ordered_by_the_alphabet(noise, projection):
    def pair():
        return ToyNoise(name=noise), Project(name=projection)

    pattern = r"a and b both act on the gradient in before_step\(\).*<b>\.after = \(\"a\",\) or <a>\.after = \(\"b\",\)"
    with pytest.raises(ConflictError, match=pattern):
        plan(Plain(), pair())
    for last, order in ((0, "projection first"), (1, "noise first")):
        for callbacks in (pair(), pair()[::-1]):
            methods = sorted(callbacks, key=lambda method: isinstance(method, Project))
            methods[last].after = (methods[1 - last].name,)
            run = fit(callbacks, optimizer="sgd")
            close = zip(by_hand(order).values(), run.module.state_dict().values(), strict=True)
            assert all(torch.allclose(p, q, atol=1e-7) for p, q in close), order


def test_writers_that_commute_or_keep_apart_need_no_order():
    plan(Plain(), [ToyNoise(name="a"), ToyNoise(name="b")])
    with pytest.raises(ConflictError):
        plan(Plain(), [ToyNoise(name="a"), Project(name="b")])
    apart = Project(name="a"), Project(name="b")
    apart[0].targets, apart[1].targets = "model.0", "model.2"
    plan(Plain(), apart)
    apart[1].targets = ["model.0", "model.2"]
    with pytest.raises(ConflictError):
        plan(Plain(), apart)


def test_hooks_and_lanes_tell_the_order_too():
    plan(Plain(), [ToySAM(), ToyNoise()])  # the one computes what the other changes
    early = type("Early", (ToyNoise,), {"lane": Lane.MASK})
    plan(Plain(), [early(), Project()])
    with pytest.raises(ConflictError, match=r"a and b both act on the gradient in compute_gradients\(\)"):
        plan(Plain(), [ToySAM(name="a"), ToySAM(name="b")])
    with pytest.raises(ConflictError, match=r"a and b both act on the optimizer in wrap_optimizer\(\)"):
        plan(Plain(), [ToyLookahead(name="a"), ToyLookahead(name="b")])


def test_who_reads_gradients_beside_one_who_changes_them_is_told_apart():
    reader = type("Reader", (Project,), {"writes": frozenset(), "reads": frozenset({Resource.GRADIENT})})
    with pytest.raises(ConflictError, match="reader and toy_noise both act on the gradient"):
        plan(Plain(), [reader(), ToyNoise()])
    plan(Plain(), [reader(name="a"), reader(name="b")])
    late = reader()
    late.after = ("toy_noise",)
    plan(Plain(), [late, ToyNoise()])


def test_a_circle_and_a_contradiction_are_refused():
    pair = ToyNoise(name="a"), Project(name="b")
    pair[0].after, pair[1].after = ("b",), ("a",)
    with pytest.raises(MisconfigurationException, match="a and b name each other in after="):
        plan(Plain(), pair)
    scale = ToyScale()
    scale.after = ("toy_noise",)
    with pytest.raises(ConflictError, match=r"its lane REPARAM comes before GRADIENT"):
        plan(Plain(), [scale, ToyNoise()])
    scale.after = ("somebody else",)  # who need not be there
    plan(Plain(), [scale, ToyNoise()])
    pair[0].after, pair[1].after = (), "aa"  # a name, not letters
    with pytest.raises(ConflictError, match="depends on which acts first"):
        plan(Plain(), pair)
    pair[1].after = "a"
    plan(Plain(), pair)


# Before and after clipping.


class Norms(Method):
    lane = Lane.GRADIENT

    def __init__(self, *, name=None):
        super().__init__(name=name)
        self.seen = []

    def look(self, when, run):
        norm = torch.stack([p.grad.norm() for p in run.module.parameters()]).norm()
        self.seen.append((when, round(norm.item(), 4)))

    def before_step(self, run, optimizer):
        self.look("before", run)

    def after_clipping(self, run, optimizer):
        self.look("after", run)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_gradients_are_seen_before_and_after_they_are_clipped(settings):
    method = Norms()
    fit([method], gradient_clip_val=0.05, **settings)
    steps = 4 // settings.get("accumulate_grad_batches", 1)
    assert [when for when, _ in method.seen] == ["before", "after"] * steps
    assert all(norm == 0.05 for when, norm in method.seen if when == "after")
    assert all(norm > 0.06 for when, norm in method.seen if when == "before")


def test_what_is_changed_after_clipping_is_what_the_step_uses():
    class Zero(Method):
        lane, writes = Lane.GRADIENT, frozenset({Resource.GRADIENT})

        def after_clipping(self, run, optimizer):
            for parameter in run.module.parameters():
                parameter.grad.zero_()

    torch.manual_seed(0)
    module = Plain("sgd")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit([Zero()], module=module, gradient_clip_val=0.05)
    assert difference(before, dict(module.state_dict())) is None


def test_by_hand_both_hooks_come_after_the_users_clipping():
    class Clips(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.base_loss(batch))
            self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()

    method = Norms()
    fit([method], style=Clips)
    assert method.seen == [("before", 0.05), ("after", 0.05)] * 4


# Batches and validations.


class Hears(ToyEntropy):
    def __init__(self, *, name=None):
        super().__init__(name=name)
        self.heard = []

    def batch_start(self, run, batch):
        self.heard.append(f"batch {batch[0].shape[0]}")

    def loss(self, step):
        self.heard.append("loss")

    def after_step(self, run):
        self.heard.append("step")

    def epoch_end(self, run):
        self.heard.append("epoch")

    def validation_start(self, run):
        self.heard.append("sanity" if run.trainer.sanity_checking else "validation")

    def validation_end(self, run):
        self.heard.append(f"{run.trainer.state.fn.value} {'val' in str(run.trainer.callback_metrics)}")


class Validates(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("val", super().base_loss(batch))


def test_batches_and_validations_are_heard_of():
    methods = [Hears(), Hears(name="other")]
    batch = ["batch 16", "loss"]
    fit(methods, style=Validates, data=loader(32, 16), num_sanity_val_steps=1, accumulate_grad_batches=2)
    assert methods[0].heard == methods[1].heard == ["sanity", *batch, *batch, "step", "validation", "fit True", "epoch"]
    trainer(callbacks=[method := Hears()]).validate(Validates(), loader(8), verbose=False)
    assert method.heard == ["validation", "validate True"]
