"""A fit that ends before something it was to bring says so, and one that brought everything says nothing."""

from __future__ import annotations

import re
import warnings

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_peft import (
    PSKD,
    BlockPruning,
    FisherEstimator,
    GroupEnvelope,
    LayerGrowth,
    MaskedPruning,
    MixtureGrowth,
    NMSparsity,
    StageSharing,
    StructuredPruning,
    TrainedRankPruning,
    WeightCompander,
)
from lightning_peft.testing.callbacks import StopAfter
from lightning_peft.testing.modules import Manual, Plain, deepened
from lightning_peft.testing.runs import fit

CUT_SHORT = {"max_epochs": 4, "after": [StopAfter()]}
LATE = {
    "growth": (lambda: LayerGrowth("stack", at="step:1000", start=2), "its change at at='step:1000', step 1000"),
    "tokens": (lambda: LayerGrowth("stack", at="tokens:1e9", start=2), r"its change at 1e\+09 tokens, of which 32 were seen"),
    "plateau": (lambda: LayerGrowth("stack", at="plateau", start=2, monitor="loss"), "a plateau: 0 of 3 looks"),
    "epoch": (lambda: LayerGrowth("stack", at=["epoch:0", "epoch:9"], to=[3, 4], start=2), "its change at at='epoch:9'"),
    "warm-up": (lambda: LayerGrowth("stack", at="step:2", start=2, lr="rewarm:50"), "the end of the warm-up at step 52"),
    "sharing": (lambda: StageSharing(2, at="75%"), "its change at at='75%', step 12"),
    "mixture": (lambda: MixtureGrowth(at="step:100"), "its change at at='step:100', step 100"),
    "masks": (lambda: MaskedPruning(0.5, start=1, end=10, every=2, exclude=()), "the last choice of masks at step 10"),
    "envelope": (lambda: GroupEnvelope(0.5, exclude=()), "the last choice of masks at step 13"),
    "rewind": (lambda: MaskedPruning(0.5, start=4, rewind=1, exclude=()), "going back to step 1"),
    "cut": (lambda: StructuredPruning(0.2, start=10), "the last cut at step 10"),
    "blocks": (lambda: BlockPruning(1, start=10, every=1), "the last cut at step 10"),
    "dense": (lambda: NMSparsity("2:4", "sr-ste", dense=10, exclude=()), "masks began at step 10"),
    "soft": (lambda: NMSparsity("2:4", fine_tune="25%", exclude=()), "masks took their final form at step 12"),
    "alpha": (lambda: PSKD(0.8, epochs=10), "alpha reached 0.8 in epoch 10; it came to 0.08"),
    "rank": (lambda: TrainedRankPruning(0.5, period=3, exclude=()), "the last truncation: its weights moved for 1 steps"),
}


def ended(methods, **settings):
    """Fit, and return what was warned of its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(methods, expected=(), **settings)
    return run, [str(w.message) for w in caught if ": this fit ended after" in str(w.message)]


@pytest.mark.parametrize(("method", "what"), LATE.values(), ids=LATE)
def test_what_did_not_come_is_said(method, what):
    method = method()
    style = Plain if isinstance(method, (MixtureGrowth, StructuredPruning)) else deepened(Plain)
    _, said = ended([method], style=style, **CUT_SHORT)
    start = f"{method.name}: this fit ended after 4 optimizer steps in 1 epochs, before "
    assert len(said) == 1
    assert said[0].startswith(start)
    assert re.search(what, said[0]), said[0]


def test_what_came_is_not_said():
    kinds = [
        [LayerGrowth("stack", at="50%", start=2, lr="rewarm:2"), MaskedPruning(0.5, start="25%", end="75%", exclude=())],
        [BlockPruning(1, start="50%", every=1), NMSparsity("2:4", "mdgf-linear", exclude=()), FisherEstimator(targets="norm")],
        [StageSharing(2, at="100%"), TrainedRankPruning(0.5, period=5, exclude=())],
    ]
    for methods in kinds[:2]:
        assert not ended(methods, style=deepened(Plain), max_epochs=2)[1]
    assert not ended([MixtureGrowth(at="50%"), PSKD(), WeightCompander(exclude="all-linear")][:2], max_epochs=2)[1]


def test_a_trial_run_is_not_expected_to_bring_anything():
    assert not ended([LayerGrowth("stack", at="step:1000", start=2)], style=deepened(Plain), fast_dev_run=True)[1]


def epochs_of_growth(**settings):
    """Epochs before which the network has grown, by its number of blocks."""
    seen = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(len(pl_module.blocks))

    fit([LayerGrowth("stack", at="epoch:2", start=2)], after=[Watch(), *settings.pop("after", [])], max_epochs=3, **settings)
    return seen


class ByFours(Manual):
    """Accumulates by hand over all of an epoch's four batches."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.base_loss(batch) / 4)
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_an_epoch_is_an_epoch_whatever_accumulates():
    plain = deepened(Plain)
    assert epochs_of_growth(style=plain) == [2, 2, 4]
    for scheduling in ({0: 1, 1: 2}, {0: 4, 1: 1}):
        assert epochs_of_growth(style=plain, after=[GradientAccumulationScheduler(scheduling)]) == [2, 2, 4]
    assert epochs_of_growth(style=plain, accumulate_grad_batches=3) == [2, 2, 4]
    with pytest.warns(UserWarning, match="takes 1 step of its first optimizer in an epoch of 4 batches"):
        assert epochs_of_growth(style=deepened(ByFours)) == [2, 2, 4]
