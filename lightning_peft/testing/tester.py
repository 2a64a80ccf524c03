"""The tests every method must pass, for one line per method."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor

import lightning_peft
from lightning_peft.compose.lanes import Lane
from lightning_peft.method import Method
from lightning_peft.structure.checkpoint import KEY
from lightning_peft.structure.plain import not_plain
from lightning_peft.testing.callbacks import Beginning, FailAt, PlannedError, StopAfter, every_epoch
from lightning_peft.testing.lasting import LastingChecks
from lightning_peft.testing.life_cycle import LifeCycleChecks
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.ordinary import OrdinaryChecks
from lightning_peft.testing.probe import shape_of
from lightning_peft.testing.references import ReferenceChecks
from lightning_peft.testing.runs import Fit, assert_same
from lightning_peft.testing.shared_runs import EPOCHS, Factory, probe_of
from lightning_peft.testing.toys import ToyEntropy, ToyShift, ToyTwice
from lightning_peft.testing.trace import difference, without
from lightning_peft.testing.trained_files import TrainedFileChecks


class MethodTester(LifeCycleChecks, OrdinaryChecks, LastingChecks, ReferenceChecks, TrainedFileChecks):
    """Subclass it in a test file, name the configurations to test, and pytest does the rest.

    Every check that a method cannot pass by its nature can be switched off with a sentence that says why; it shows up as
    skipped, with that sentence. Where the method must refuse instead, the sentence is a pattern that its refusal matches.

    Attributes:
        methods: Functions without arguments, each returning a new method in one configuration. The first one leads: where a
            check is about what the method meets and not about its arguments (module styles, compilers, other precisions and
            devices), it stands for all, so begin with the one that does most.
        no_accumulation: Why training on k small batches differs from training on one big one.
        no_exact_bake: Why the baked module computes something else than the module in training.
        no_ordinary_file: Why a file of the middle of training, loaded without the method, computes something else.
        no_styles: Names of module styles (``STYLES``) the method refuses, each with the reason.
        no_stream: Pattern of the refusal to train on a loader without a length.
        no_part: Pattern of the refusal of a part beside every linear layer, or of a first layer that is frozen.
        no_shared: Pattern of the refusal of a network that uses one layer in two places.
        no_teacher: Pattern of the refusal of a module that holds a copy of its network.
        new_parameters: Why the module ends with other parameter objects than it was given.
        removed_parts: Why the module ends with fewer layers than it was given.
        references: Loops by hand, or of official code, that end where the method does; see
            :class:`~lightning_peft.testing.references.Reference`.
        tolerance: Largest difference of a weight that counts as rounding in the checks that are not bit for bit.
        every_one_sharded: Whether every configuration is trained under FSDP2, and not the first alone.
        adapted: Turns a module style into one that the method can work on.

    Example:
        .. code-block:: python

            class TestMyMethod(MethodTester):
                methods = [MyMethod, lambda: MyMethod(strength=0.5)]
    """

    methods: ClassVar[Sequence[Factory]]
    no_accumulation: ClassVar[str] = ""
    no_exact_bake: ClassVar[str] = ""
    no_styles: ClassVar[dict[str, str]] = {}
    new_parameters: ClassVar[str] = ""
    removed_parts: ClassVar[str] = ""
    tolerance: ClassVar[float] = 1e-5
    every_one_sharded: ClassVar[bool] = False
    adapted: ClassVar[Callable[[type[Plain]], type[Plain]]] = staticmethod(lambda style: style)

    # Does it train, and does it do anything?

    def test_trains(self, factory: Factory, uninterrupted: Fit) -> None:
        losses = uninterrupted.losses
        assert all(map(math.isfinite, losses)), f"the module's own loss became NaN or infinite: {losses}"
        size = len(losses) // EPOCHS
        first, last = sum(losses[:size]) / size, sum(losses[-size:]) / size
        assert last < first, f"the module's own loss went from {first:.4f} to {last:.4f} in {EPOCHS} epochs: it must fall"
        if uninterrupted.methods[0].lane != Lane.REPORT:
            same = difference(dict(self._plain().module.state_dict()), dict(uninterrupted.module.state_dict())) is None
            assert not same, "the trained weights are exactly those of a training without the method: it did nothing"

    def test_accumulation(self, factory: Factory) -> None:
        if self.no_accumulation:
            pytest.skip(self.no_accumulation)
        small = self._fit([factory()], optimizer="sgd", data=loader(32, 4), accumulate_grad_batches=2)
        self._assert_close(self._descended(factory), small, "2 batches of 4 accumulated against 1 batch of 8")

    def test_bf16(self, lead: Factory) -> None:
        run = self._fit([lead()], precision="bf16-mixed", after=[StopAfter()], max_epochs=EPOCHS)
        wrong = [name for name, value in run.module.named_parameters() if value.dtype != torch.float32]
        assert not wrong, f"bf16-mixed must leave parameters in float32; these are not: {wrong}"
        exact = self._fit([lead()], after=[StopAfter()], max_epochs=EPOCHS)
        pairs = list(zip(exact.losses, run.losses, strict=True))
        assert all(math.isclose(a, b, rel_tol=0.1) for a, b in pairs), f"losses in float32 against bf16-mixed: {pairs}"

    # torch's compiler looks at this attribute of every input, and hides its warning in a way that "error" defeats.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_compiled(self, lead: Factory) -> None:
        torch.manual_seed(0)
        module = self.style("sgd")
        for child in module.children():
            child.compile(backend="eager")
        compiled = self._fit([lead()], module=module)
        torch._dynamo.reset()
        self._assert_close(self._descended(lead), compiled, "eager against a compiled submodule")

    # Does it go on exactly where it stopped?

    def test_resumes_from_every_epoch(self, factory: Factory, uninterrupted: Fit, folder: Path) -> None:
        for epoch in range(EPOCHS - 1):
            resumed = self._fit([factory()], seed=epoch + 5, resume=folder / f"epoch={epoch}.ckpt", max_epochs=EPOCHS)
            assert_same(uninterrupted, resumed, f"uninterrupted against resumed after epoch {epoch}")

    def test_resumes_after_the_fit_has_ended(self, factory: Factory, uninterrupted: Fit, tmp_path: Path) -> None:
        stopped = self._fit([factory()], after=[StopAfter()], max_epochs=EPOCHS)
        stopped.trainer.save_checkpoint(tmp_path / "ended.ckpt")
        resumed = self._fit([factory()], seed=7, resume=tmp_path / "ended.ckpt", max_epochs=EPOCHS)
        assert_same(uninterrupted, resumed, "uninterrupted against resumed from a file saved after fit() returned")

    def test_state_is_plain(self, uninterrupted: Fit, folder: Path) -> None:
        # What state() returns is looked at whenever it is saved.
        checkpoint = torch.load(folder / "epoch=0.ckpt", weights_only=True)
        found = not_plain(checkpoint[KEY], f"checkpoint[{KEY!r}]")
        assert found is None, f"{found}; check what config() of the method and its weight maps return"

    def test_fits_again(self, factory: Factory) -> None:
        first = self._fit([factory()])
        left = first.state()
        again = self._fit(first.methods, module=first.module)
        assert all(map(math.isfinite, again.losses)), f"second fit of one module: the loss became {again.losses}"
        self._assert_clean(again.module, "two fits")
        twice = again.state()
        other = self._fit(first.methods)
        found = difference(left, other.state())
        assert found is None, f"a new module trained with a used object, against a new object: {found}"
        anew = self._fit([factory()], module=other.module)
        found = difference(twice, anew.state())
        assert found is None, f"a module trained again with a used object, against a new object: {found}"

    def test_a_step_evaluated_twice_leaves_what_one_does(self, factory: Factory, uninterrupted: Fit) -> None:
        twice = self._fit([factory(), ToyTwice(name="twice")], max_epochs=EPOCHS).state()
        twice["callbacks"].pop(f"{KEY}/twice")
        for part in ("state_dict", "optimizer_states", "callbacks"):
            found = difference(uninterrupted.state()[part], twice[part])
            assert found is None, (
                f"a training against one whose steps are evaluated once more (StepClosure.again): {part}{found}. Remember "
                "nothing in loss() when step.repeated, and in calls of layers only if in_training_step()"
            )
        if not self.no_accumulation:
            self._fit([factory(), ToyTwice()], max_epochs=2, accumulate_grad_batches=2)

    # Is the module left as it was?

    def test_works_with_every_style(self, lead: Factory, style: type[Plain], tmp_path: Path) -> None:
        if style.__name__ in self.no_styles:
            pytest.skip(self.no_styles[style.__name__])
        run = self._fit([lead()], style=self._adapted(style), after=[every_epoch(tmp_path)], max_epochs=2)
        assert all(map(math.isfinite, run.losses)), f"{style.__name__}: the loss became NaN or infinite: {run.losses}"
        self._assert_clean(run.module, "fit")
        resumed = self._fit([lead()], style=self._adapted(style), seed=5, resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
        assert_same(run, resumed, f"{style.__name__}: uninterrupted against resumed")

    @pytest.mark.parametrize("step", [0, 2])
    def test_leaves_no_trace_after_an_exception(self, factory: Factory, step: int) -> None:
        torch.manual_seed(0)
        module = self.style()
        before = copy.deepcopy(module.state_dict())
        parameters = dict(module.named_parameters())
        with pytest.raises(PlannedError):
            self._fit([factory()], after=[FailAt(step)], module=module)
        self._assert_clean(module, f"an exception before step {step}")
        same = all(value is parameters[name] for name, value in module.named_parameters())
        excused = self.new_parameters and step > 0
        assert same or excused, "parameters were replaced by other objects; optimizers of the user now hold the wrong ones"
        if step == 0:
            found = difference(dict(before), dict(module.state_dict()))
            assert found is None, f"nothing was trained, but the module is not what it was: {found}"

    def test_evaluation_changes_nothing(self, factory: Factory) -> None:
        torch.manual_seed(0)
        module = self.style()
        before = copy.deepcopy(module.state_dict())
        for stage in ("validate", "test", "predict"):
            runner = trainer(callbacks=[factory()])
            getattr(runner, stage)(module, loader(), **({} if stage == "predict" else {"verbose": False}))
            self._assert_clean(module, stage)
            found = difference(dict(before), dict(module.state_dict()))
            assert found is None, f"{stage} of an untrained module changed it: {found}"

    # Does it get along with others?

    def test_order_of_callbacks_is_irrelevant(self, factory: Factory) -> None:
        first = self._fit([factory(), ToyEntropy(name="companion")])
        second = self._fit([ToyEntropy(name="companion"), factory()], before=[Callback()])
        first.methods.reverse()
        assert_same(first, second, "[method, companion] against [companion, method]")

    def test_keeps_its_values_on_another_map(self, factory: Factory) -> None:
        alone, beside = (self._begun([factory(), *others]) for others in ([], [ToyShift(name="companion")]))
        for place, (one, other) in enumerate(zip(alone, beside, strict=True)):
            when = ("at the start", "with plain weights loaded")[place]
            error = (one - other).abs().max().item()
            assert error <= self.tolerance, (
                f"{when}, the network computes something else ({error:.3g}) when another map with an inverse stands on the "
                "same tensors; see right_inverse"
            )

    def _begun(self, methods: list[Method]) -> list[Tensor]:
        beginning = Beginning()
        with pytest.raises(PlannedError):
            self._fit(methods, after=[beginning])
        return beginning.outputs

    @pytest.mark.parametrize("averaging", ["EMA", "SWA"])
    def test_weight_averaging(self, factory: Factory, averaging: str) -> None:
        def average() -> Callback:
            return EMAWeightAveraging(decay=0.5) if averaging == "EMA" else StochasticWeightAveraging(1e-2, swa_epoch_start=1)

        first = self._fit([factory()], before=[average()], max_epochs=EPOCHS).module
        last = self._fit([factory()], after=[average()], max_epochs=EPOCHS).module
        found = difference(dict(first.state_dict()), dict(last.state_dict()))
        assert found is None, f"{averaging} before the method against after it in the callbacks list: {found}"
        broken = [name for name, value in first.state_dict().items() if not value.isfinite().all()]
        assert not broken, f"{averaging}: not finite: {broken}"
        self._assert_clean(first, averaging)

    def test_copies(self, uninterrupted: Fit) -> None:
        probe = probe_of(uninterrupted)
        assert torch.equal(probe.live, probe.copied), "copy.deepcopy(module) in training computes something else than module"
        assert probe.independent, "changing the weights of copy.deepcopy(module) changed what module computes"

    # Does it end in an ordinary module?

    def test_bake_equals_training(self, uninterrupted: Fit) -> None:
        probe = probe_of(uninterrupted)
        found = difference(shape_of(self.style()), probe.baked_shape)
        assert found is None, f"bake(copy.deepcopy(module)) is no ordinary module: {found}"
        if self.no_exact_bake:
            pytest.skip(self.no_exact_bake)
        error = (probe.live - probe.baked).abs().max().item()
        assert error <= self.tolerance, f"baked and live outputs differ by {error:.3g}; see WeightMap.bake and no_exact_bake"

    def test_checkpoint_loads_baked(self, uninterrupted: Fit, folder: Path) -> None:
        loaded = lightning_peft.load_from_checkpoint(self.style, folder / f"epoch={EPOCHS - 1}.ckpt")
        found = difference(dict(uninterrupted.module.state_dict()), dict(loaded.state_dict()))
        assert found is None, f"the module after fit() against load_from_checkpoint of its last checkpoint: {found}"
        lightning_peft.bake_checkpoint(folder / "epoch=0.ckpt", folder / "baked.ckpt")
        self.style.load_from_checkpoint(folder / "baked.ckpt", weights_only=True)

    def test_two_processes(self, factory: Factory, two_ranks: list[Any]) -> None:
        plain, first, second = two_ranks[0][0], *(rank[1 + self.methods.index(factory)] for rank in two_ranks)
        if not first:
            pytest.skip("the method does not support DDP")
        found = difference(first["weights"], second["weights"])
        assert found is None, f"after DDP training rank 0 and rank 1 hold different weights: {found}"
        expected = without(plain["trace"], first["trace"]) if self.removed_parts else plain["trace"]
        found = difference(expected, first["trace"])
        assert found is None, f"DDP left something on the module: {found}"

    def test_sharded(self, factory: Factory, two_ranks: list[Any]) -> None:
        first, second = (rank[1 + self.methods.index(factory)] for rank in two_ranks)
        if "shards" not in first:
            pytest.skip("the method does not support FSDP2, or the first configuration stands for this one")
        found = difference(first["shards"], second["shards"])
        assert found is None, f"after FSDP2 training rank 0 and rank 1 hold different weights: {found}"
        found = difference(first["shards"], first["resumed"])
        assert found is None, f"resumed under FSDP2 from a folder of shards of the first of two epochs: {found}"
        assert first["folder"] is None, f"a folder of shards against the file of the same training: {first['folder']}"
        if self.no_accumulation:
            pytest.skip(self.no_accumulation)
        error = max((value - first["alone"][name]).abs().max().item() for name, value in first["shards"].items())
        assert error <= 1e-12, f"two processes that share the parameters end with other weights than one: {error:.3g}"
