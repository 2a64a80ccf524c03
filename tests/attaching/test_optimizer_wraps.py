"""Optimizers that methods wrap or replace, beside the same written by hand in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from lightning_peft import Lane, LayerGrowth, Method, Resource, WrappedOptimizer
from lightning_peft.optim.schedulers import group_lists
from lightning_peft.testing import run_ddp
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, TwoOptimizers, deepened, loader, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.testing.toys import Lookahead, ToyLookahead, ToySAM, ToyScale
from lightning_peft.testing.trace import difference

SCHEDULERS = {
    "none": lambda optimizer: None,
    "step": lambda optimizer: StepLR(optimizer, 3, 0.5),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cycle": lambda optimizer: OneCycleLR(optimizer, 0.05, total_steps=20),
    "chain": lambda optimizer: SequentialLR(optimizer, [StepLR(optimizer, 2, 0.5), StepLR(optimizer, 1, 0.9)], [4]),
}


class Scheduled(Plain):
    scheduler = "lambda"

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        scheduler = SCHEDULERS[self.scheduler](optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def style(scheduler):
    return type(f"Scheduled{scheduler}", (Scheduled,), {"scheduler": scheduler})


def seeded(style, optimizer="adam"):
    torch.manual_seed(0)
    return style(optimizer)


def loss_of(module, batch):
    return F.cross_entropy(module.logits(batch[0]), batch[1])


def by_hand(module, optimizer, every=3, share=0.5, epochs=3, scaler=None):
    """Algorithm 1 of Zhang et al., slow weights in a list."""
    scheduler = SCHEDULERS[module.scheduler](optimizer)
    slow = [p.detach().clone() for p in module.parameters()]
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    steps = 0
    for batch in [*loader()] * epochs:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.half, enabled=scaler.is_enabled(), cache_enabled=False):
            loss = loss_of(module, batch)
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        steps += scaler.get_scale() >= before
        if scaler.get_scale() >= before and steps % every == 0:
            with torch.no_grad():
                for p, kept in zip(module.parameters(), slow, strict=True):
                    kept.lerp_(p, share)
                    p.copy_(kept)
        if scheduler is not None:
            scheduler.step()
    return dict(module.state_dict())


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "none"])
@pytest.mark.parametrize(
    ("name", "make"),
    [("adam", lambda p: torch.optim.Adam(p, lr=0.02)), ("sgd", lambda p: torch.optim.SGD(p, lr=0.02))],
    ids=["adam", "sgd"],
)
def test_lookahead_is_lookahead_under_a_scheduler(scheduler, name, make):
    module = seeded(style(scheduler), name)
    hand = by_hand(module, make(module.parameters()))
    run = fit([ToyLookahead()], module=seeded(style(scheduler), name), max_epochs=3)
    assert difference(hand, dict(run.module.state_dict())) is None
    plain = fit([], module=seeded(style(scheduler), name), max_epochs=3)
    assert difference(dict(plain.module.state_dict()), dict(run.module.state_dict())) is not None


def test_lookahead_counts_the_steps_that_a_gradient_scaler_lets_through():
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3)

    module = seeded(style("none"))
    hand = by_hand(module, torch.optim.Adam(module.parameters(), lr=0.02), scaler=scaler())
    plugins = [MixedPrecision("16-mixed", "cpu", scaler())]
    method = ToyLookahead()
    run = fit([method], module=seeded(style("none")), max_epochs=3, plugins=plugins)
    assert difference(hand, dict(run.module.state_dict())) is None
    assert 0 < method.steps < 12


@pytest.mark.parametrize("others", [list, lambda: [ToyScale(), ToySAM()]], ids=["alone", "map and step"])
@pytest.mark.parametrize("average", [False, True], ids=["", "EMA"])
@pytest.mark.parametrize("scheduler", ["lambda", "cycle", "chain"])
def test_lookahead_resumes_exactly(scheduler, average, others, tmp_path):
    def trained(**settings):
        before = [EMAWeightAveraging(decay=0.5)] if average else []
        return fit([ToyLookahead(), *others()], style=style(scheduler), before=before, max_epochs=3, **settings)

    whole = trained(after=[every_epoch(tmp_path)])
    for epoch in range(2):
        resumed = trained(seed=7, resume=tmp_path / f"epoch={epoch}.ckpt")
        assert_same(whole, resumed, f"resumed after epoch {epoch}")
    slow = [state["slow_steps"] for state in whole.trainer.optimizers[0].state.values()]
    assert slow == [12] * len(slow)


def test_lookahead_beside_growth(tmp_path):
    def trained(**settings):
        methods = [ToyLookahead(), LayerGrowth(at="step:6", start=2, optimizer_state="copy")]
        return fit(methods, style=deepened(style("step")), max_epochs=3, **settings)

    whole = trained(after=[every_epoch(tmp_path)])
    assert len(whole.module.blocks) == 4
    for epoch in range(2):
        assert_same(whole, trained(seed=7, resume=tmp_path / f"epoch={epoch}.ckpt"), f"resumed after epoch {epoch}")
    optimizer = whole.trainer.optimizers[0]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert len(held) == len([*whole.module.parameters()])
    assert {optimizer.state[p]["slow_steps"] for p in held} == {6}, "slow weights must begin again at the edit"


def test_two_optimizers_by_hand():
    def slow_steps(run):
        return [{state["slow_steps"] for state in optimizer.state.values()} for optimizer in run.trainer.optimizers]

    run = fit([ToyLookahead()], style=TwoOptimizers, max_epochs=2)
    assert slow_steps(run) == [{8}, {8}]


def on_rank():
    torch.manual_seed(0)
    module = Plain("sgd")
    trainer(devices=2, strategy="ddp", callbacks=[ToyLookahead()], max_epochs=2).fit(module, loader(32, 4))
    return dict(module.state_dict())


def test_two_ranks_look_ahead_alike():
    assert difference(*run_ddp(f"{__file__}:on_rank")) is None


# Replaced, not wrapped.


class Replaces(Method):
    """Trains by SGD whatever the user chose."""

    lane, writes = Lane.GRADIENT, frozenset({Resource.OPTIMIZER})

    def wrap_optimizer(self, run, optimizer):
        return torch.optim.SGD(optimizer.param_groups, lr=0.1, momentum=0.9)


def test_a_replacement_follows_the_scheduler_also_after_a_resume(tmp_path):
    module = seeded(style("lambda"))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
    hand = by_hand(module, optimizer, every=99)
    whole = fit([Replaces()], module=seeded(style("lambda")), max_epochs=3, after=[every_epoch(tmp_path)])
    assert difference(hand, dict(whole.module.state_dict())) is None
    resumed = fit([Replaces()], style=style("lambda"), seed=7, resume=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert_same(whole, resumed, "resumed with a replaced optimizer")
    assert whole.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 / 13)


def test_a_replacement_gives_maps_their_groups_under_the_scheduler(tmp_path):
    class Decays(style("lambda")):
        def make_optimizer(self, parameters):
            return torch.optim.Adam(parameters, lr=0.02, weight_decay=0.01)  # of which the map's own parameters want none

    def trained(**settings):
        return fit([Replaces(), ToyScale()], style=Decays, max_epochs=3, **settings)

    whole = trained(after=[every_epoch(tmp_path)])
    groups = whole.trainer.optimizers[0].param_groups
    assert len(groups) == 2
    assert {group["lr"] for group in groups} == {groups[0]["lr"]}
    assert_same(whole, trained(seed=7, resume=tmp_path / "epoch=1.ckpt"), "resumed")


@pytest.mark.parametrize(
    "make",
    [lambda optimizer: None, lambda optimizer: torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1)],
    ids=["none", "other groups"],
)
def test_an_optimizer_of_other_groups_is_refused(make):
    class Wrong(Replaces):
        def wrap_optimizer(self, run, optimizer):
            return make(optimizer)

    with pytest.raises(MisconfigurationException, match=r"wrong\.wrap_optimizer.*WrappedOptimizer, or build .*param_groups"):
        fit([Wrong()])


# The wrapper itself.


def test_a_wrapper_is_the_optimizer_it_wraps():
    parameter = torch.nn.Parameter(torch.ones(2))
    inner = torch.optim.Adam([parameter], lr=0.1)
    scheduler = ReduceLROnPlateau(inner)
    wrapper = Lookahead(inner, every=2, share=0.5)
    parameter.grad = torch.ones(2)
    heard = []
    wrapper.register_step_post_hook(lambda *_: heard.append("step"))
    wrapper.step()
    assert heard == ["step"]
    assert wrapper.param_groups is inner.param_groups
    assert wrapper.defaults["lr"] == 0.1
    assert group_lists([scheduler], wrapper) == group_lists([scheduler], inner) != {}
    wrapper.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    assert len(inner.param_groups) == 2
    wrapper.zero_grad()
    assert parameter.grad is None
    twin = copy.deepcopy(wrapper)
    assert isinstance(twin, WrappedOptimizer)
    assert twin.every == 2
    assert difference(twin.state_dict(), wrapper.state_dict()) is None
    assert twin.state is not wrapper.state
    twin.load_state_dict(wrapper.state_dict())
    assert twin.param_groups is twin.inner.param_groups


def test_nothing_is_wrapped_when_nobody_asks():
    run = fit([ToyScale()])
    assert type(run.trainer.optimizers[0]) is torch.optim.Adam
