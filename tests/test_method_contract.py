"""Every method of this repository through the same tests, and proof that those tests notice a method that is wrong."""

from __future__ import annotations

import time

import pytest
import torch

from lightning_peft import PSKD, Lane, Method, NMSparsity, WeightCompander, WeightMap
from lightning_peft.testing import STYLES, MethodTester, run_ddp
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.probe import Probe
from lightning_peft.testing.runs import fit
from lightning_peft.testing.shared_runs import EPOCHS
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold


class TestToyScale(MethodTester):
    methods = [ToyScale, lambda: ToyScale(0.5, exclude="head")]


class TestToyThreshold(MethodTester):
    methods = [ToyThreshold]


class TestToyEntropy(MethodTester):
    methods = [ToyEntropy]


class TestNMSparsity(MethodTester):
    methods = [
        lambda: NMSparsity("2:4", exclude=()),
        lambda: NMSparsity("1:4", recipe="one-shot", targets="all-weights", exclude=(), dense="25%"),
        lambda: NMSparsity("2:4", recipe="sdgf-stepwise", targets="all-weights", exclude=(), refresh=2),
    ]
    no_exact_bake = "a soft or wider mask is in force until the last step; baking applies the target pattern"


class TestWeightCompander(MethodTester):
    methods = [WeightCompander, lambda: WeightCompander(headroom=1.2, slope=4.0, learnable=False)]


class TestPSKD(MethodTester):
    methods = [PSKD, lambda: PSKD(alpha=0.5, teacher="copy")]


# Methods that are wrong in one way each, and the check that must say so.


class Nothing(Method):
    lane = Lane.LOSS


class Forgetful(ToyEntropy):
    """Its term depends on something it does not save."""

    def loss(self, step):
        self.hidden = getattr(self, "hidden", 0) + 1
        return super().loss(step) * self.hidden

    def state(self):
        return {}

    def load_state(self, state):
        pass


class Littering(ToyScale):
    def attach(self, module):
        super().attach(module)
        module.left_behind = True


class Soft(WeightMap):
    kind, lane = "test_soft", Lane.MASK

    def forward(self, weight):
        return 0.5 * weight

    def bake(self, weight):
        return weight


class SoftMask(ToyThreshold):
    weight_maps = (Soft,)

    def attach(self, module):
        for name in self.claims(module):
            self.map_weight(module, name, Soft())


class Summed(ToyEntropy):
    """Forgets that a term is a mean over the batch."""

    def loss(self, step):
        return super().loss(step) * len(step.batch[0])


class OrderDependent(ToyEntropy):
    def loss(self, step):
        first = step.run.trainer.callbacks[0] is self
        return super().loss(step) * (1 + first)


class Unsaveable(ToyEntropy):
    def state(self):
        return {"seen": {1, 2}}


class FullPrecision(ToyScale):
    def attach(self, module):
        module.bfloat16()


class Evaluating(ToyScale):
    def attach(self, module):
        super().attach(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)


def run_of(factory, folder):
    return fit([factory()], after=[every_epoch(folder), Probe()], max_epochs=EPOCHS)


@pytest.mark.parametrize(
    ("factory", "check", "message"),
    [
        (Nothing, lambda t, f, d: t.test_trains(f, run_of(f, d)), "it did nothing"),
        (Forgetful, lambda t, f, d: t.test_resumes_from_every_epoch(f, run_of(f, d), d), "not the same, bit for bit"),
        (Forgetful, lambda t, f, d: t.test_resumes_after_the_fit_has_ended(f, run_of(f, d), d), "not the same, bit for bit"),
        (Littering, lambda t, f, d: t.test_works_with_every_style(f, STYLES[0], d), "only one side has 'left_behind'"),
        (Littering, lambda t, f, d: t.test_leaves_no_trace_after_an_exception(f, 2), "left_behind"),
        (SoftMask, lambda t, f, d: t.test_bake_equals_training(run_of(f, d)), "baked and live outputs differ"),
        (Summed, lambda t, f, d: t.test_accumulation(f), "2 batches of 4 accumulated against 1 batch of 8"),
        (OrderDependent, lambda t, f, d: t.test_order_of_callbacks_is_irrelevant(f), r"\[method, companion\] against"),
        (FullPrecision, lambda t, f, d: t.test_bf16(f), "must leave parameters in float32"),
        (Evaluating, lambda t, f, d: t.test_evaluation_changes_nothing(f), "validate of an untrained module changed it"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_tester_notices(factory, check, message, tmp_path):
    tester = type("Tester", (MethodTester,), {"methods": [factory]})()
    with pytest.raises(AssertionError, match=message):
        check(tester, factory, tmp_path)


def failing():
    raise ValueError("on purpose")


def hanging():
    time.sleep(600)


def test_a_failing_rank_is_reported_with_its_output():
    with pytest.raises(RuntimeError, match=r"(?s)failing failed in 2 processes.*ValueError: on purpose"):
        run_ddp(f"{__file__}:failing")


def test_hanging_ranks_are_ended():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"time limit 3 s"):
        run_ddp(f"{__file__}:hanging", timeout=3)
    assert time.monotonic() - start < 60
