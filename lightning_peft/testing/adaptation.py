"""The tests of methods that answer the network's calls in evaluations (lane ``ADAPT``), for one line per method."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_peft.capture.shim import Shim
from lightning_peft.method import Method
from lightning_peft.testing.callbacks import PlannedError
from lightning_peft.testing.modules import Plain, trainer
from lightning_peft.testing.ordinary import Elsewhere, left_behind
from lightning_peft.testing.pictures import BatchNormPictures, LayerNormPictures, picture_loader
from lightning_peft.testing.runs import fit, resumable, seed_all
from lightning_peft.testing.shared_runs import Factory, SharedRuns
from lightning_peft.testing.toys import ToyThreshold
from lightning_peft.testing.trace import difference, trace
from lightning_peft.weights.maps import mapped_tensors

Answers = list[Tensor]
THRESHOLD = 0.5


class AdaptationTester(SharedRuns):
    """Subclass it in a test file, name the configurations to test, and pytest does the rest.

    Attributes:
        methods: Functions that return a new method in one configuration; they pass keyword arguments on (``keep``).
        no_keep: Why the method has nothing to leave in the module.
        no_styles: Pattern of the refusal of a module style (``BatchNormPictures``, ``LayerNormPictures``), by its name.
        tolerance: Largest difference of an answer that counts as rounding in the checks that are not bit for bit.

    Example:
        .. code-block:: python

            class TestMyAdaptation(AdaptationTester):
                methods = [partial(MyAdaptation, lr=0.05)]
    """

    methods: ClassVar[Sequence[Callable[..., Method]]]
    no_keep: ClassVar[str] = ""
    no_styles: ClassVar[dict[str, str]] = {}
    styles = (BatchNormPictures, LayerNormPictures)
    on_rank = "adapt_on_rank"

    @property
    def style(self) -> type[Plain]:
        """The module that most checks evaluate."""
        return self.styles[0]

    # Does it do anything, and the same again?

    @pytest.mark.parametrize("verb", ["test", "validate", "predict"])
    def test_answers_and_gives_the_module_back(self, factory: Factory, verb: str) -> None:
        module = built(self.style)
        module.model[0].weight.requires_grad_(False)
        plain = answers(module, [], verb)
        before, looked = copy.deepcopy(module.state_dict()), trace(module)
        method = factory()
        first = answers(module, [method], verb)
        assert not all(map(torch.equal, plain, first)), f"{verb}: the answers are those of the network alone"
        found = difference(dict(before), dict(module.state_dict())) or difference(looked, trace(module))
        assert found is None, f"{verb}: the module before against after it: {found}"
        for again, what in ((method, "the same object"), (factory(), "a new object")):
            found = difference(first, answers(module, [again], verb))
            assert found is None, f"{verb} and {verb} once more with {what}: other answers: {found}"

    def test_works_with_every_style(self, factory: Factory, style: type[Plain]) -> None:
        if style.__name__ in self.no_styles:
            with pytest.raises(MisconfigurationException, match=self.no_styles[style.__name__]):
                answers(built(style), [factory()])
            return
        module = built(style)
        plain, before = answers(module, []), copy.deepcopy(module.state_dict())
        assert not all(map(torch.equal, plain, answers(module, [factory()]))), "the answers are those of the network alone"
        assert difference(dict(before), dict(module.state_dict())) is None
        if self.no_keep:
            pytest.skip(self.no_keep)
        looked = trace(module)
        answers(module, [factory(keep=True)])  # type: ignore[call-arg]
        assert difference(dict(before), dict(module.state_dict())) is not None, "keep=True left nothing in the module"
        found = difference(looked, trace(module))
        assert found is None, f"keep=True left more than values in the module: {found}"
        assert not all(map(torch.equal, plain, answers(module, []))), "the module that was kept answers as it did before"

    def test_two_loaders(self, factory: Factory) -> None:
        alone = answers(built(self.style), [factory()])
        both = answers(built(self.style), [factory()], data=[picture_loader(), picture_loader(seed=1)])
        assert len(both) == 2 * len(alone)
        found = difference(alone, both[: len(alone)])
        assert found is None, f"a loader alone against before another: {found}"

    def test_bf16(self, factory: Factory) -> None:
        module = built(self.style)
        before = copy.deepcopy(module.state_dict())
        exact = answers(built(self.style), [factory()])[0]
        rough = answers(module, [factory()], precision="bf16-mixed")[0]
        error = (exact.softmax(-1) - rough.float().softmax(-1)).abs().mean().item()
        assert error < 0.02, f"bf16-mixed against float32: probabilities of the first batch differ by {error:.3g} on average"
        found = difference(dict(before), dict(module.state_dict()))
        assert found is None, f"the module before against after bf16-mixed: {found}"

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_compiled(self, factory: Factory) -> None:
        module = built(self.style)
        module.model.compile(backend="eager")
        compiled = answers(module, [factory()])
        torch._dynamo.reset()
        eager = answers(built(self.style), [factory()])
        error = max(float((a - b).abs().max()) for a, b in zip(eager, compiled, strict=True))
        assert error <= self.tolerance, f"eager against a compiled network: answers differ by {error:.3g}"

    # Is the module left as it was?

    @pytest.mark.parametrize("error", [PlannedError(), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
    def test_a_failure_gives_the_module_back(self, factory: Factory, error: BaseException) -> None:
        module = built(self.style)
        answers(module, [])
        looked, before = trace(module), copy.deepcopy(module.state_dict())
        with pytest.raises((PlannedError, SystemExit, KeyboardInterrupt)):
            answers(module, [factory(), StopTesting(error)])
        found = difference(dict(before), dict(module.state_dict())) or difference(looked, trace(module.train()))
        assert found is None, f"the module before against after {error!r} in a test: {found}"

    def test_follows_a_move_at_the_end(self, factory: Factory) -> None:
        module = built(self.style)
        before = copy.deepcopy(module).double().state_dict()
        answers(module, [factory()], strategy=Elsewhere(), devices="auto")
        stayed = left_behind(module)
        assert not stayed, f"the strategy moved the module before callbacks were torn down; these stayed behind: {stayed}"
        found = difference(dict(before), dict(module.state_dict()))
        assert found is None, f"a module that is moved at the end holds other values: {found}"

    def test_the_module_is_an_ordinary_one_meanwhile(self, factory: Factory) -> None:
        look, module = Look(), built(self.style)
        names = [list(module.state_dict()), [name for name, _ in module.named_parameters()]]
        answers(module, [factory(), look])
        assert look.names == names, "names of the module's tensors change while it is adapted"
        inputs = next(iter(picture_loader()))[0]
        for route, twin in {**look.twins, "copy.deepcopy afterwards": copy.deepcopy(module)}.items():
            plain = self.style()
            plain.load_state_dict(twin.state_dict())
            found = difference(trace(plain.eval())["hooks"], trace(twin.eval())["hooks"])
            assert found is None, f"an ordinary module against {route}: {found}"
            shims = [name for name, part in twin.named_modules() if isinstance(vars(part).get("forward"), Shim)]
            assert not shims, f"{route} still answers by the method: {shims}"
            with torch.inference_mode():  # copies may have been made in it
                assert torch.equal(twin.model(inputs), plain.model(inputs)), f"{route} computes something of its own"

    def test_a_fit_and_its_checkpoints_do_not_know_of_it(self, factory: Factory, tmp_path: Path) -> None:
        plain = fit([], style=self.style, data=picture_loader())
        run = fit([factory()], style=self.style, data=picture_loader())
        found = difference(dict(plain.module.state_dict()), dict(run.module.state_dict()))
        assert found is None, f"a fit without against one with the method: {found}"
        found = difference(plain.module.answers, run.module.answers)
        assert found is None, f"the validation within a fit shows another network: {found}"
        run.trainer.save_checkpoint(tmp_path / "before.ckpt")
        answers(run.module, None, runner=run.trainer)
        run.trainer.save_checkpoint(tmp_path / "after.ckpt")
        before, after = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("before", "after"))
        found = difference(resumable(before), resumable(after))
        assert found is None, f"a checkpoint before against after a test: {found}"
        loaded = self.style.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=True)
        found = difference(dict(plain.module.state_dict()), dict(loaded.state_dict()))
        assert found is None, f"a fit without the method against the checkpoint of a test after it: {found}"

    # Does it get along with others?

    def test_a_trained_mask_holds(self, factory: Factory) -> None:
        module: Any = fit([ToyThreshold(THRESHOLD)], style=self.style).module
        before = copy.deepcopy(module.state_dict())
        watch = MaskedWeights()
        answers(module, [ToyThreshold(THRESHOLD), factory(), watch])
        assert watch.weights, "there was no mask"
        leaked = [name for name, weight in watch.weights.items() if ((weight != 0) & (weight.abs() < THRESHOLD)).any()]
        assert not leaked, f"while the module was adapted its layers saw weights that the mask leaves out: {leaked}"
        found = difference(dict(before), dict(module.state_dict()))
        assert found is None, f"a module that was trained under a mask, before against after a test: {found}"

    def test_two_processes(self, factory: Factory, two_ranks: list[Any]) -> None:
        for rank, results in enumerate(two_ranks):
            found = results[self.methods.index(factory)]
            if isinstance(found, str):
                assert factory().name in found, f"the refusal of two processes names no method: {found}"
                continue
            assert found["changed"] is None, f"rank {rank}: the module before against after a test: {found['changed']}"
            dataset: Any = picture_loader().dataset
            own = DataLoader(Subset(dataset, range(rank, len(dataset), 2)), batch_size=8)
            wrong = difference(answers(built(self.style), [factory()], data=own), found["answers"])
            assert wrong is None, f"rank {rank} alone with its samples against beside another rank: {wrong}"

    def test_sharded(self, factory: Factory, two_ranks: list[Any]) -> None:
        for rank, results in enumerate(two_ranks):
            found = results[self.methods.index(factory)]
            if "in shards" not in found:
                pytest.skip("the method does not support FSDP2")
            assert found["changed in shards"] is None, f"rank {rank}: before against after a test: {found['changed in shards']}"
            pairs = zip(found["answers"], found["in shards"], strict=True)
            error = max((whole - shared).abs().max().item() for whole, shared in pairs)
            assert error <= self.tolerance, f"rank {rank}: answers of DDP and of FSDP2 differ by {error:.3g}"


def built(style: type[Plain]) -> Any:
    """A new module of a style, always the same."""
    seed_all(0)
    return style()


def answers(
    module: Any, callbacks: Sequence[Any] | None, verb: str = "test", data: Any = None, runner: Any = None, **settings: Any
) -> Answers:
    """Evaluate a module of a style in :mod:`~lightning_peft.testing.pictures` and return its logits, batch by batch."""
    module.answers.clear()
    runner = trainer(callbacks=list(callbacks or ()), **settings) if runner is None else runner
    quiet = {} if verb == "predict" else {"verbose": False}
    getattr(runner, verb)(module, picture_loader() if data is None else data, **quiet)
    return list(module.answers)


class StopTesting(Callback):
    """Ends a test in its third batch."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *place: Any) -> None:
        if batch_idx == 2:
            raise self.error


class Look(Callback):
    """Lists, copies and saves the module in the middle of a test."""

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *place: Any) -> None:
        if batch_idx == 1:
            self.names = [list(pl_module.state_dict()), [name for name, _ in pl_module.named_parameters()]]
            file = io.BytesIO()
            torch.save(pl_module, file)
            file.seek(0)
            self.twins = {"copy.deepcopy": copy.deepcopy(pl_module), "torch.save": torch.load(file, weights_only=False)}


class MaskedWeights(Callback):
    """Keeps the weights that masked layers see at the end of a test."""

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights = {
            mapped.name: getattr(mapped.layer, mapped.attribute).detach().clone() for mapped in mapped_tensors(pl_module)
        }
