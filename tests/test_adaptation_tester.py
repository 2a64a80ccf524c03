"""Methods of lane ADAPT that are wrong in one way each, and the check that must say so."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_peft.testing import AdaptationTester
from lightning_peft.testing.callbacks import PlannedError
from lightning_peft.testing.pictures import LayerNormPictures
from lightning_peft.testing.toys import ToyCentring
from lightning_peft.weights.maps import mapped_tensors


class Idle(ToyCentring):
    def adapt(self, call):
        return call()


class Keeping(ToyCentring):
    """Always keeps what it learnt."""

    def finish(self, run):
        pass


class Forgetting(ToyCentring):
    """Never keeps what it learnt."""

    def finish(self, run):
        self.keep = False
        super().finish(run)


class Littering(ToyCentring):
    def adapt_start(self, run):
        super().adapt_start(run)
        run.module.left_behind = True


class Thawing(ToyCentring):
    def finish(self, run):
        super().finish(run)
        run.module.requires_grad_(True)


class Remembering(ToyCentring):
    """Learns a little faster in every evaluation of one object."""

    def adapt_start(self, run):
        super().adapt_start(run)
        self.rate *= 1.1


class Outliving(ToyCentring):
    """Learns a little faster with every object."""

    ever: ClassVar[list[float]] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ever.append(1.0)
        self.rate = 0.1 * len(self.ever)


class Foreseeing(ToyCentring):
    """Learns another way when it knows of another loader to come."""

    def adapt_start(self, run):
        super().adapt_start(run)
        self.rate /= len(run.trainer.num_test_batches)


class FullPrecision(ToyCentring):
    def adapt(self, call):
        logits = super().adapt(call)
        return logits if logits.dtype == torch.float32 else logits * 0


class Eager(ToyCentring):
    """Does something else to a network that is compiled."""

    def adapt_start(self, run):
        super().adapt_start(run)
        self.rate *= 1 if run.network._compiled_call_impl is None else 2


class FairWeather(ToyCentring):
    """Gives the module back unless something went wrong."""

    def finish(self, run):
        self.keep = run.trainer.interrupted
        super().finish(run)


class HeldAside(ToyCentring):
    """Has another tensor stand in for the bias while it adapts."""

    def adapt_start(self, run):
        super().adapt_start(run)
        self.layer, self.held = run.network[-1], self.bias
        self.layer.bias = self.bias = nn.Parameter(self.held.detach().clone(), requires_grad=False)

    def finish(self, run):
        if self.source is not None:
            self.layer.bias = self.held
        self.source = None


class Hooking(ToyCentring):
    def adapt_start(self, run):
        super().adapt_start(run)
        self.hook = run.network[-1].register_forward_hook(print_nothing)

    def finish(self, run):
        super().finish(run)
        if run.trainer.testing:
            self.hook.remove()


def print_nothing(*_):
    """At the top of a module, where pickle finds it."""


class Renaming(ToyCentring):
    """Has a buffer more while it adapts."""

    def adapt_start(self, run):
        super().adapt_start(run)
        run.network[-1].register_buffer("seen", torch.zeros(1))

    def finish(self, run):
        super().finish(run)
        del run.network[-1].seen


class Training(ToyCentring):
    """Adapts in a fit too."""

    def start(self, run):
        run.module.model[-1].bias.data += 1.0


class Unmasking(ToyCentring):
    """Fills in what a mask has left out."""

    def adapt(self, call):
        for mapped in mapped_tensors(self.run.module):
            mapped.maps[0].threshold = 0.0
            mapped.stored.add_(0.001)
        return super().adapt(call)


@pytest.mark.parametrize(
    ("factory", "check", "message"),
    [
        (Idle, lambda t, f, d: t.test_answers_and_gives_the_module_back(f, "test"), "those of the network alone"),
        (Keeping, lambda t, f, d: t.test_answers_and_gives_the_module_back(f, "validate"), r"before against after.*bias"),
        (Littering, lambda t, f, d: t.test_answers_and_gives_the_module_back(f, "predict"), "left_behind"),
        (Thawing, lambda t, f, d: t.test_answers_and_gives_the_module_back(f, "test"), r"\['parameters'\].*False against True"),
        (Remembering, lambda t, f, d: t.test_answers_and_gives_the_module_back(f, "test"), "once more with the same object"),
        (Outliving, lambda t, f, d: t.test_answers_and_gives_the_module_back(f, "test"), "once more with a new object"),
        (Idle, lambda t, f, d: t.test_works_with_every_style(f, LayerNormPictures), "those of the network alone"),
        (Forgetting, lambda t, f, d: t.test_works_with_every_style(f, LayerNormPictures), "left nothing in the module"),
        (Foreseeing, lambda t, f, d: t.test_two_loaders(f), "alone against before another"),
        (FullPrecision, lambda t, f, d: t.test_bf16(f), "bf16-mixed against float32"),
        (Keeping, lambda t, f, d: t.test_bf16(f), "before against after bf16-mixed"),
        (Eager, lambda t, f, d: t.test_compiled(f), "eager against a compiled network"),
        (
            FairWeather,
            lambda t, f, d: t.test_a_failure_gives_the_module_back(f, PlannedError()),
            "before against after Planned",
        ),
        (HeldAside, lambda t, f, d: t.test_follows_a_move_at_the_end(f), r"these stayed behind: .*bias"),
        (Keeping, lambda t, f, d: t.test_follows_a_move_at_the_end(f), "moved at the end holds other values"),
        (Hooking, lambda t, f, d: t.test_the_module_is_an_ordinary_one_meanwhile(f), "against copy.deepcopy: .*hooks"),
        (Renaming, lambda t, f, d: t.test_the_module_is_an_ordinary_one_meanwhile(f), "names of the module's tensors change"),
        (Training, lambda t, f, d: t.test_a_fit_and_its_checkpoints_do_not_know_of_it(f, d), "a fit without against one with"),
        (
            Keeping,
            lambda t, f, d: t.test_a_fit_and_its_checkpoints_do_not_know_of_it(f, d),
            "a checkpoint before against",
        ),
        (Unmasking, lambda t, f, d: t.test_a_trained_mask_holds(f), "its layers saw weights that the mask leaves out"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_tester_notices(factory, check, message, tmp_path):
    tester = type("Tester", (AdaptationTester,), {"methods": [factory]})()
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check(tester, factory, tmp_path)


def test_ranks_that_adapt_otherwise_are_noticed():
    tester = type("Tester", (AdaptationTester,), {"methods": [ToyCentring]})()
    with pytest.raises(AssertionError, match="before against after a test: bias"):
        tester.test_two_processes(ToyCentring, [[{"answers": [], "changed": "bias"}]])
    with pytest.raises(AssertionError, match="rank 0 alone with its samples against"):
        tester.test_two_processes(ToyCentring, [[{"answers": [], "changed": None}]])
    with pytest.raises(AssertionError, match="names no method"):
        tester.test_two_processes(ToyCentring, [["two processes are one too many"]])
    tester.test_two_processes(ToyCentring, [["toy_centring knows one process only; use devices=1"]])
