"""Methods that are wrong in one way each, and the check that must say so."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import pytest
import torch
from test_method_contract import sam

from lightning_peft import Lane, Method, WeightMap
from lightning_peft.testing import STYLES, MethodTester, Reference
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.ordinary import Elsewhere
from lightning_peft.testing.probe import Probe, unlike
from lightning_peft.testing.runs import fit
from lightning_peft.testing.shared_runs import EPOCHS
from lightning_peft.testing.toys import ScaleMap, ToyEntropy, ToySAM, ToyScale, ToyThreshold
from lightning_peft.testing.trace import trace
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.parts import placed_parts


class Nothing(Method):
    lane = Lane.LOSS


class Forgetful(ToyEntropy):
    """Its term depends on something it does not save."""

    def loss(self, step):
        self.hidden = getattr(self, "hidden", 0) + 1
        return super().loss(step) * self.hidden

    def state(self):
        return {}

    def state_form(self, tensors):
        return None

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


class Climbing(ToyEntropy):
    """Its term outweighs the loss it is added to."""

    def loss(self, step):
        return -3.0 * step.base_loss


class Unsaveable(ToyScale):
    def attach(self, module):
        super().attach(module)
        for mapped in mapped_tensors(module):
            mapped.maps[0].config = lambda: {"start": {2.0}}


class Tuned(ToyThreshold):
    """Changes a map in training without a word of it in the checkpoint."""

    def after_step(self, run):
        for mapped in mapped_tensors(run.module):
            mapped.maps[0].bake = torch.zeros_like


class Compiled(ToyThreshold):
    """Computes something else under a compiler."""

    def attach(self, module):
        super().attach(module)
        for mapped in mapped_tensors(module):
            mapped.maps[0].forward = lambda weight: weight * (0.5 if torch.compiler.is_compiling() else 1.0)


class Outliving(ToyEntropy):
    """Counts in its class, which no new training makes forget."""

    ever: ClassVar[list[int]] = []

    def loss(self, step):
        self.ever.append(step.run.step)
        return super().loss(step) * len(self.ever)


class Recognising(ToyEntropy):
    """Trains a module it has trained before in another way."""

    ever: ClassVar[set[tuple[int, int]]] = set()

    def start(self, run):
        self.known = (id(self), id(run.module)) in self.ever

    def loss(self, step):
        return super().loss(step) * (1 + self.known)

    def finish(self, run):
        self.ever.add((id(self), id(run.module)))


class Infinite(ToyEntropy):
    def finish(self, run):
        with torch.no_grad():
            run.module.model[0].bias.fill_(torch.inf)


class AsksWhere(ToyEntropy):
    def loss(self, step):
        return super().loss(step) * (1 + isinstance(step.run.trainer.strategy, Elsewhere))


class AsksTheEnd(Method):
    lane = Lane.LOSS

    def loss(self, step):
        return step.base_loss * (step.run.trainer.max_steps > 0)


class Miscounting(ToyEntropy):
    """Trains the same after a resume, but forgets how long it has."""

    def load_state(self, state):
        pass


class Buffering(ToyEntropy):
    def attach(self, module):
        module.model[0].register_buffer("seen", torch.zeros(1))

    def finish(self, run):
        del run.module.model[0].seen


class Uncopied(ToyScale):
    """Copies of the module share a layer with it."""

    def attach(self, module):
        super().attach(module)
        module.model[4].__deepcopy__ = lambda memo: module.model[4]

    def finish(self, run):
        del run.module.model[4].__deepcopy__


class CopiedWrong(ToyScale):
    def attach(self, module):
        super().attach(module)
        for mapped in mapped_tensors(module):
            mapped.maps[0].__deepcopy__ = lambda memo: ScaleMap(3.0)


class Early(ToyEntropy):
    """Replaces a parameter before anything was trained."""

    def attach(self, module):
        module.model[0].bias = torch.nn.Parameter(module.model[0].bias.detach().clone())


class FullPrecision(ToyScale):
    def attach(self, module):
        module.bfloat16()


class Coarse(ToyEntropy):
    """Loses its term where the network computes in half precision."""

    def loss(self, step):
        return super().loss(step) * (1000.0 if step.logits.dtype == torch.float32 else 0.0)


class Evaluating(ToyScale):
    def attach(self, module):
        super().attach(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)


class AsksTheEpoch(ToyEntropy):
    """Wants to know the length of an epoch before there is a loader."""

    def start(self, run):
        super().start(run)
        self.length = int(run.trainer.num_training_batches)


class AsksTheLoader(ToyScale):
    def after_step(self, run):
        self.length = len(run.trainer.train_dataloader)


class AsksTheLog(ToyEntropy):
    """Relies on a metric that not every module logs."""

    def after_step(self, run):
        assert "loss" in run.trainer.callback_metrics, "nobody logged a loss"


class Validating(ToyEntropy):
    """Weighs its term by how often it was shown validation batches, the sanity check among them."""

    looks = 0

    def on_validation_batch_end(self, *args):
        self.looks += 1

    def loss(self, step):
        return super().loss(step) * (1 + self.looks)


class Reordering(ToyEntropy):
    """Moves a weight behind the bias of its layer, as ``torch.nn.utils.parametrize`` does."""

    def attach(self, module):
        self.layer = module.model[0]
        self.layer.weight = self.layer._parameters.pop("weight")

    def finish(self, run):
        self.layer.bias = self.layer._parameters.pop("bias")


class Unpicklable(ToyEntropy):
    def attach(self, module):
        module.kept = lambda: None

    def finish(self, run):
        del run.module.kept


class HeldAside(ToyEntropy):
    """Has another tensor stand in for a bias during the run, and puts the old one back when all is over."""

    def attach(self, module):
        self.held = module.model[0].bias
        module.model[0].bias = torch.nn.Parameter(self.held.detach().clone())

    def finish(self, run):
        run.module.model[0].bias = self.held


class Replacing(ToyEntropy):
    def finish(self, run):
        run.module.model[0].bias = torch.nn.Parameter(run.module.model[0].bias.detach().clone())


class Wrapping(ToyEntropy):
    """Gives one of two names of a layer another layer, which pickles as such."""

    def attach(self, module):
        self.first, module.model[4] = module.model[4], torch.nn.Sequential(module.model[4])

    def finish(self, run):
        run.module.model[4] = self.first


class CountsTwice(ToyEntropy):
    """Remembers a step that is evaluated once more as two."""

    def loss(self, step):
        self.seen["epochs"] += 1
        return super().loss(step)


class Thawing(ToyEntropy):
    """Trains what the user froze."""

    def attach(self, module):
        module.requires_grad_(True)


class Stilling(ToyEntropy):
    """Lets parts of others not be trained."""

    def start(self, run):
        for placed in placed_parts(run.module):
            placed.part.requires_grad_(False)


class Hiding(ToyEntropy):
    """Has parts of others not stand in files."""

    def attach(self, module):
        for placed in placed_parts(module):
            placed.part.recorded = False


def run_of(factory, folder):
    return fit([factory()], after=[every_epoch(folder), Probe()], max_epochs=EPOCHS)


@pytest.mark.parametrize(
    ("factory", "check", "message"),
    [
        (Nothing, lambda t, f, d: t.test_trains(f, run_of(f, d)), "it did nothing"),
        (Climbing, lambda t, f, d: t.test_trains(f, run_of(f, d)), "it must fall"),
        (Compiled, lambda t, f, d: t.test_compiled(f), "eager against a compiled submodule"),
        (CountsTwice, lambda t, f, d: t.test_a_step_evaluated_twice_leaves_what_one_does(f, run_of(f, d)), "step.repeated"),
        (Unsaveable, lambda t, f, d: t.test_state_is_plain(run_of(f, d), d), "check what config"),
        (Outliving, lambda t, f, d: t.test_fits_again(f), "a new module trained with a used object"),
        (Recognising, lambda t, f, d: t.test_fits_again(f), "a module trained again with a used object"),
        (Infinite, lambda t, f, d: t.test_weight_averaging(f, "EMA"), "EMA: not finite: .*0.bias"),
        (Unpicklable, lambda t, f, d: t.test_pickles_of_a_shared_layer_are_baked(f), "a layer used twice, .*lambda"),
        (AsksWhere, lambda t, f, d: t.test_follows_a_move_at_the_end(f), "stays against one that is moved"),
        (Littering, lambda t, f, d: t.test_fits_again(f), "after two fits.*left_behind"),
        (Forgetful, lambda t, f, d: t.test_works_with_every_style(f, STYLES[0], d), "uninterrupted against resumed"),
        (Evaluating, lambda t, f, d: t.test_leaves_no_trace_after_an_exception(f, 0), "nothing was trained, but"),
        (Early, lambda t, f, d: t.test_leaves_no_trace_after_an_exception(f, 0), "replaced by other objects"),
        (Littering, lambda t, f, d: t.test_evaluation_changes_nothing(f), "after validate.*left_behind"),
        (OrderDependent, lambda t, f, d: t.test_weight_averaging(f, "EMA"), "EMA before the method against after it"),
        (Littering, lambda t, f, d: t.test_weight_averaging(f, "SWA"), "after SWA.*left_behind"),
        (CopiedWrong, lambda t, f, d: t.test_copies(run_of(f, d)), "computes something else than module"),
        (Uncopied, lambda t, f, d: t.test_copies(run_of(f, d)), "changed what module computes"),
        (Buffering, lambda t, f, d: t.test_bake_equals_training(run_of(f, d)), "no ordinary module.*seen"),
        (Tuned, lambda t, f, d: t.test_checkpoint_loads_baked(run_of(f, d), d), "load_from_checkpoint of its last"),
        (Forgetful, lambda t, f, d: t.test_resumes_from_every_epoch(f, run_of(f, d), d), "not the same, bit for bit"),
        (Forgetful, lambda t, f, d: t.test_resumes_after_the_fit_has_ended(f, run_of(f, d), d), "not the same, bit for bit"),
        (Littering, lambda t, f, d: t.test_works_with_every_style(f, STYLES[0], d), "only one side has 'left_behind'"),
        (Littering, lambda t, f, d: t.test_leaves_no_trace_after_an_exception(f, 2), "left_behind"),
        (SoftMask, lambda t, f, d: t.test_bake_equals_training(run_of(f, d)), "baked and live outputs differ"),
        (Summed, lambda t, f, d: t.test_accumulation(f), "2 batches of 4 accumulated against 1 batch of 8"),
        (OrderDependent, lambda t, f, d: t.test_order_of_callbacks_is_irrelevant(f), r"\[method, companion\] against"),
        (FullPrecision, lambda t, f, d: t.test_bf16(f), "must leave parameters in float32"),
        (Coarse, lambda t, f, d: t.test_bf16(f), "losses in float32 against bf16-mixed"),
        (Evaluating, lambda t, f, d: t.test_evaluation_changes_nothing(f), "validate of an untrained module changed it"),
        (AsksTheEnd, lambda t, f, d: t.test_ends_after_steps(f, run_of(f, d)), r"against Trainer\(max_steps"),
        (AsksTheEnd, lambda t, f, d: t.test_trains_on_a_stream(f, run_of(f, d)), "with a length against one without"),
        (Miscounting, lambda t, f, d: t.test_resumes_from_every_epoch(f, run_of(f, d), d), "optimizer_steps"),
        (AsksTheEpoch, lambda t, f, d: t.test_ends_after_steps(f, run_of(f, d)), "cannot convert float infinity"),
        (AsksTheEpoch, lambda t, f, d: t.test_validates_before_it_trains(f, run_of(f, d)), "cannot convert float infinity"),
        (AsksTheLoader, lambda t, f, d: t.test_trains_on_a_stream(f, run_of(f, d)), "has no len"),
        (AsksTheLog, lambda t, f, d: t.test_validates_before_it_trains(f, run_of(f, d)), "nobody logged a loss"),
        (Validating, lambda t, f, d: t.test_validates_before_it_trains(f, run_of(f, d)), "without against with a sanity check"),
        (
            Reordering,
            lambda t, f, d: t.test_parameters_keep_their_places(run_of(f, d)),
            "'model.0.weight' against 'model.0.bias'",
        ),
        (Thawing, lambda t, f, d: t.test_resumes_from_what_was_trained(f, d), "holds a parameter that was not: model.0.bias"),
        (Stilling, lambda t, f, d: t.test_resumes_from_what_was_trained(f, d), "that nobody trains: "),
        (Hiding, lambda t, f, d: t.test_resumes_from_what_was_trained(f, d), "the parts beside the method are in no file"),
        (Forgetful, lambda t, f, d: t.test_resumes_from_what_was_trained(f, d), "resumed from a file of what was trained"),
        (Reordering, lambda t, f, d: t.test_a_teacher_follows_by_place(f), r"these follow others.*0\.weight"),
        (Unpicklable, lambda t, f, d: t.test_pickles_are_baked(run_of(f, d)), "dumps.*in training against.*lambda"),
        (Wrapping, lambda t, f, d: t.test_pickles_of_a_shared_layer_are_baked(f), "a layer used twice"),
        (HeldAside, lambda t, f, d: t.test_follows_a_move_at_the_end(f), r"these stayed behind: \['model\.0\.bias'\]"),
        (
            Replacing,
            lambda t, f, d: t.test_follows_a_move_at_the_end(f),
            "replaced by others in the move: .*0.bias",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_tester_notices(factory, check, message, tmp_path):
    tester = type("Tester", (MethodTester,), {"methods": [factory]})()
    with pytest.raises((AssertionError, OverflowError, TypeError), match=message):
        check(tester, factory, tmp_path)


@pytest.mark.parametrize(
    ("loop", "method", "message"),
    [
        (partial(sam, radius=0.1), lambda: ToySAM(0.11), "differs from that of a loop by hand"),
        (partial(sam, radius=-0.1), lambda: ToySAM(0.1), "differs from that of a loop by hand"),
        (lambda task: sam(task, 0.1) or [1.0] * 12, lambda: ToySAM(0.1), "losses differ"),
        (lambda task: [*map(task.step, map(task.loss, task.batches))] and None, lambda: ToyEntropy(0.0), "proves nothing"),
    ],
    ids=["a length", "a sign", "losses", "no difference"],
)
def test_a_loop_by_hand_that_is_wrong_in_one_term_is_noticed(loop, method, message):
    tester = type("Tester", (MethodTester,), {"methods": [method]})()
    tester.test_agrees_with_a_loop_by_hand(Reference(partial(sam, radius=0.1), lambda: ToySAM(0.1), optimizer="sgd"))
    with pytest.raises(AssertionError, match=message):
        tester.test_agrees_with_a_loop_by_hand(Reference(loop, method, optimizer="sgd"))


def test_a_pickle_is_held_against_the_ordinary_module():
    def found(back):
        return unlike(net(), torch.ones(2, 2), lambda: back)

    def net(slope=0.1, factor=1.0):
        layer = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(layer.weight, -factor)
        torch.nn.init.zeros_(layer.bias)
        return torch.nn.Sequential(layer, torch.nn.LeakyReLU(slope))

    assert found(net()) is None
    assert "0.weight" in found(net(factor=2.0))
    assert "output" in found(net(slope=0.2))
    assert "LeakyReLU" in found(torch.nn.Sequential(net()[0], torch.nn.ReLU()))


def test_ranks_that_differ_are_noticed():
    def found(methods, seed=0):
        module = fit(methods, seed=seed).module
        return {"weights": dict(module.state_dict()), "trace": trace(module)}

    tester = type("Tester", (MethodTester,), {"methods": [Littering]})()
    plain, trained = found([]), found([Littering()])
    with pytest.raises(AssertionError, match=r"rank 0 and rank 1 hold different weights: .*0\.weight"):
        tester.test_two_processes(Littering, [[plain, trained], [plain, found([Littering()], seed=1)]])
    with pytest.raises(AssertionError, match=r"DDP left something on the module: .*left_behind"):
        tester.test_two_processes(Littering, [[plain, trained]] * 2)


@pytest.mark.parametrize("attribute", ["no_part", "no_stream", "no_shared", "no_teacher"])
def test_a_refusal_that_does_not_come_is_noticed(attribute, tmp_path):
    tester = type("Tester", (MethodTester,), {"methods": [ToyThreshold], attribute: "never said"})()
    checks = {
        "no_part": lambda: tester.test_resumes_from_what_was_trained(ToyThreshold, tmp_path),
        "no_stream": lambda: tester.test_trains_on_a_stream(ToyThreshold, None),
        "no_shared": lambda: tester.test_pickles_of_a_shared_layer_are_baked(ToyThreshold),
        "no_teacher": lambda: tester.test_a_teacher_follows_by_place(ToyThreshold),
    }
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        checks[attribute]()
