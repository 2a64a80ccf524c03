"""A module in a layer's place: in training, in checkpoints, and taken out again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

import lightning_peft
from lightning_peft import NMSparsity, Wanda, split_low_rank
from lightning_peft.compose.run import Run
from lightning_peft.structure import journal
from lightning_peft.structure.checkpoint import KEY
from lightning_peft.structure.depth import blocks_edit
from lightning_peft.structure.edits import EditRequest
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.foresight import check_sizes
from lightning_peft.structure.low_rank_pair import LowRankPair
from lightning_peft.structure.put import put_edit
from lightning_peft.testing import run_ddp
from lightning_peft.testing.callbacks import FailAt, PlannedError, every_epoch
from lightning_peft.testing.modules import Manual, Plain, deepened, loader, trainer
from lightning_peft.testing.runs import Fit, assert_same, fit
from lightning_peft.testing.toys import Adapted, Adapter, ToyScale, ToyThreshold, ToyWrap
from lightning_peft.testing.trace import difference

PROBE = torch.linspace(-1, 1, 48).view(3, 16)
HERE = str(Path(__file__))


class ToySplit(ToyWrap):
    """Replaces the layer by a pair of rank 3, whose factors are random."""

    replacements = (LowRankPair,)

    def next_edit(self, run: Run) -> EditRequest | None:
        if run.step < self.at or journal.journal_of(run.module):
            return None
        return EditRequest(self.put(run.module, "model.0", LowRankPair(3)) | {"by": self.name, "seed": 2})


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def by_hand(at: int, steps: int, wrap: Callable[[nn.Module], nn.Module], seed: int) -> Plain:
    """A loop that puts the same module in place before step ``at``, its new parameters in the one group there is."""
    torch.manual_seed(0)
    module = Plain()
    optimizer = module.configure_optimizers()
    optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer["optimizer"]
    done = 0
    while done < steps:
        for inputs, target, *_ in loader():
            if done == at:
                torch.manual_seed(seed)
                old = set(module.model[0].parameters())
                module.model[0] = wrap(module.model[0])
                new = [p for p in module.model[0].parameters() if p not in old]
                optimizer.param_groups[0]["params"] += new
            optimizer.zero_grad()
            nn.functional.cross_entropy(module.model(inputs), target).backward()
            optimizer.step()
            done += 1
    return module


@pytest.mark.parametrize(
    ("method", "build", "seed"),
    [(lambda: ToyWrap(at=3), lambda layer: Adapted(layer, 3), 1), (lambda: ToySplit(at=3), LowRankPair(3).build, 2)],
    ids=["wrap", "replace"],
)
def test_training_goes_on_as_in_a_loop_by_hand(method: Any, build: Any, seed: int) -> None:
    run = fit([method()], max_epochs=2)
    found = difference(values(by_hand(3, 8, build, seed)), values(run.module))
    assert found is None, found


RESUMED: dict[str, tuple[Callable[[], list[Any]], dict[str, Any]]] = {
    "wrap": (lambda: [ToyWrap(at=6)], {}),
    "replace": (lambda: [ToySplit(at=6)], {}),
    "bf16": (lambda: [ToyWrap(at=6)], {"precision": "bf16-mixed"}),
    "clipping": (lambda: [ToyWrap(at=6)], {"gradient_clip_val": 0.1}),
    "accumulation": (lambda: [ToyWrap(at=3)], {"accumulate_grad_batches": 2}),
    "manual": (lambda: [ToyWrap(at=6)], {"style": Manual}),
    "sgd": (lambda: [ToySplit(at=6)], {"optimizer": "sgd"}),
    "masks": (lambda: [ToyWrap(at=6), NMSparsity("2:4", exclude=())], {}),
    "map inside": (lambda: [ToyWrap(at=6), ToyScale()], {}),
    "map beside": (lambda: [ToySplit(at=6), ToyScale(exclude=["model.0"])], {}),
    "scores": (lambda: [ToyWrap(at=6), Wanda(0.5, end=9)], {}),
    "EMA": (lambda: [ToyWrap(at=6), EMAWeightAveraging(decay=0.5)], {}),
    "EMA of a pair": (lambda: [EMAWeightAveraging(decay=0.5), ToySplit(at=6)], {}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumes_bit_for_bit(case: str, tmp_path: Path) -> None:
    make, settings = RESUMED[case]
    whole = fit(make(), after=[every_epoch(tmp_path)], max_epochs=3, **settings)
    assert len(journal.journal_of(whole.module)) == 1
    for epoch in (0, 1):
        resumed = fit(make(), seed=epoch + 5, resume=tmp_path / f"epoch={epoch}.ckpt", max_epochs=3, **settings)
        assert_same(whole, resumed, f"{case}: uninterrupted against resumed after epoch {epoch}")


class Trajectory(Callback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.average: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.steps.append(values(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.average = values(next(c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))._average_model.module)


def test_an_average_is_wrapped_like_the_module() -> None:
    """What goes on keeps its average under its new name, what is new begins as in the module."""
    watcher, layer = Trajectory(), nn.Linear(16, 16)
    fit([ToyWrap(at=3)], before=[watcher, EMAWeightAveraging(decay=0.5)], max_epochs=2)
    torch.manual_seed(1)
    average = {f"model.0.{name}": tensor for name, tensor in Adapted(layer, 3).state_dict().items() if "layer." not in name}
    for step, weights in enumerate(watcher.steps):
        for name, weight in weights.items():
            known = name if step <= 3 and "layer." not in name else name.replace("layer.", "" if step == 3 else "layer.")
            average[name] = weight if step == 0 else average[known].lerp(weight, 0.5)
    found = {name: average[name] for name in watcher.average}
    for name, tensor in watcher.average.items():
        torch.testing.assert_close(tensor, found[name])


def saved(method: Callable[[], Any], folder: Path) -> Fit:
    return fit([method()], after=[every_epoch(folder)], max_epochs=2)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
@pytest.mark.parametrize("method", [ToyWrap, ToySplit])
def test_files_bring_the_structure_with_them(method: Any, tmp_path: Path) -> None:
    run = saved(method, tmp_path)
    expected = run.module.eval()(PROBE)
    loaded = lightning_peft.load_from_checkpoint(Plain, tmp_path / "epoch=1.ckpt")
    lightning_peft.bake_checkpoint(tmp_path / "epoch=1.ckpt", tmp_path / "baked.ckpt")
    baked = lightning_peft.load_from_checkpoint(Plain, tmp_path / "baked.ckpt")
    lightning_peft.save_baked(run.module, tmp_path / "folder")
    from_folder = Plain()
    lightning_peft.load_baked(from_folder, tmp_path / "folder")
    runner, tested = trainer(callbacks=[NMSparsity("2:4", targets="model.2", exclude=())]), Plain()
    runner.test(tested, loader(8), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    for module in (loaded, baked, from_folder, tested):
        assert torch.equal(module.eval()(PROBE), expected)
        assert type(module) is Plain


def test_a_module_goes_back_to_before_the_edit_and_on_again(tmp_path: Path) -> None:
    for method in (lambda: ToyWrap(at=6), lambda: ToySplit(at=6)):
        run = fit([method()], after=[every_epoch(tmp_path / repr(method()))], max_epochs=3)
        early = tmp_path / repr(method()) / "epoch=0.ckpt"
        again = fit([method()], module=run.module, resume=early, max_epochs=3)
        assert_same(fit([method()], max_epochs=3), again, "uninterrupted against rewound and resumed")


def test_a_copy_of_a_split_module_goes_back_too(tmp_path: Path) -> None:
    run = fit([ToySplit(at=6)], after=[every_epoch(tmp_path)], max_epochs=3)
    twin = copy.deepcopy(run.module)
    again = fit([ToySplit(at=6)], module=twin, resume=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert_same(run, again, "uninterrupted against a copy, rewound and resumed")


@pytest.mark.parametrize("step", [0, 5])
def test_a_failure_leaves_what_was_trained(step: int) -> None:
    module = Plain()
    layer = module.model[0]
    with pytest.raises(PlannedError):
        fit([ToyWrap(at=2)], module=module, after=[FailAt(step)], max_epochs=2)
    assert (module.model[0] is layer) == (step == 0)


def edit(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda section: section["journal"]["edits"][0].__setitem__(key, value)


TAMPERS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "code": (edit("method", "os.system"), "There is no method 'os.system'"),
    "a class of torch": (edit("kind", "torch.nn.Identity"), "ToyWrap knows no replacement 'torch.nn.Identity'"),
    "of the engine": (edit("method", None), "This version of lightning-peft knows no replacement 'toy_adapter'"),
    "path": (edit("path", "model.7"), "has no submodule 'model.7'"),
    "the module": (edit("path", ""), "name a layer within it"),
    "layer": (edit("path", "model.1"), "then Linear:"),
    "size": (edit("config", {"width": 10**12}), "width=1000000000000 is not a whole number"),
    "argument": (edit("config", {"wide": 3}), "arguments of 'toy_adapter' do not fit"),
    "places": (edit("also", ["model.2"]), "in 2 places"),
    "type": (edit("config", None), r"malformed: \['config'\] is None, not a dict"),
}


@pytest.mark.parametrize("what", TAMPERS)
def test_what_does_not_fit_is_refused_before_a_weight_is_touched(what: str, tmp_path: Path) -> None:
    saved(ToyWrap, tmp_path)
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    change, message = TAMPERS[what]
    change(checkpoint[KEY])
    torch.save(checkpoint, tmp_path / "tampered.ckpt")
    module = Plain()
    before, layer = values(module), module.model[0]
    with pytest.raises(MisconfigurationException, match=message):
        trainer(callbacks=[ToyWrap()]).test(module, loader(8), ckpt_path=tmp_path / "tampered.ckpt", verbose=False)
    assert module.model[0] is layer
    assert difference(before, values(module)) is None
    with pytest.raises(MisconfigurationException, match=message):
        lightning_peft.load_from_checkpoint(Plain, tmp_path / "tampered.ckpt")


def test_what_is_put_in_place_draws_nothing_from_the_training() -> None:
    class Generator(Callback):
        def __init__(self) -> None:
            self.states: list[torch.Tensor] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.states.append(torch.get_rng_state())

    watch = Generator()
    run = fit([ToySplit()], after=[watch])
    assert isinstance(run.module.model[0], nn.Sequential), "random factors stand in the layer's place"
    assert all(torch.equal(state, watch.states[0]) for state in watch.states)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
def test_a_refused_file_leaves_a_mapped_layer_as_it_was(tmp_path: Path) -> None:
    """The replay takes the layer out with its map; then a tensor of another layer does not fit."""
    saved(ToySplit, tmp_path)
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.4.bias"] = torch.zeros(7)
    torch.save(checkpoint, tmp_path / "tampered.ckpt")
    module = Plain()
    before = values(module)
    with pytest.raises(CheckpointError, match=r"model\.4\.bias with shape"):
        trainer(callbacks=[ToyScale()]).test(module, loader(8), ckpt_path=tmp_path / "tampered.ckpt", verbose=False)
    assert difference(before, values(module)) is None
    assert journal.journal_of(module) == []
    assert type(module.model[0]) is nn.Linear


class Tied(Plain):
    """One layer in two places."""

    def build(self) -> None:
        layer = nn.Linear(16, 16)
        self.model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize("replacement", [Adapter(2), LowRankPair(4)], ids=["wrap", "replace"])
def test_a_layer_in_two_places_is_one_module_in_both_and_comes_back(replacement: Any) -> None:
    module = Tied().eval()
    layer, before, output = module.model[0], values(module), module(PROBE)
    edited = put_edit(module, "model.0", replacement, method=None if isinstance(replacement, LowRankPair) else "ToyWrap")
    assert edited["also"] == ["model.2"]
    change = journal.edit(module, edited)
    assert module.model[0] is module.model[2] is not layer
    assert not any(part.training for part in module.modules())
    bias = "model.2.1.bias" if isinstance(replacement, LowRankPair) else "model.2.layer.bias"
    assert change.new_name("model.2.bias") == bias
    assert module.state_dict()[bias].data_ptr() == before_pointer(layer)
    journal.take_back(module)
    assert module.model[0] is module.model[2] is layer
    assert difference(before, values(module)) is None
    assert torch.equal(module(PROBE), output)


def before_pointer(layer: Any) -> int:
    return int(layer.bias.data_ptr())


def test_edits_of_the_same_place_follow_each_other_in_a_file(tmp_path: Path) -> None:
    """Blocks are stacked, one is wrapped inside, the whole list is wrapped."""
    style = deepened(Plain, 2)
    torch.manual_seed(0)
    module = style()
    journal.edit(module, blocks_edit(module, "blocks", [0, 1, 0]))
    journal.edit(module, put_edit(module, "blocks.2.fc1", LowRankPair(2)))
    journal.edit(module, put_edit(module, "model.0", LowRankPair(2)))
    runner = trainer(max_epochs=1, callbacks=[ToyThreshold(targets=["model.4"])])
    runner.fit(module, loader(8), loader(8))
    runner.save_checkpoint(tmp_path / "edited.ckpt")
    loaded = lightning_peft.load_from_checkpoint(style, tmp_path / "edited.ckpt")
    assert torch.equal(loaded.eval()(PROBE), module.eval()(PROBE))
    assert journal.journal_of(loaded) == journal.journal_of(module)


def test_a_list_that_was_wrapped_is_not_missed_in_the_file() -> None:
    blocks = {"op": "blocks", "path": "h", "from": 1, "sources": [0, 0], "block": ["Linear:12345678"]}
    wrap = {"op": "put", "path": "h"}
    check_sizes([blocks, wrap], {"h.inner.0.w": torch.ones(1)})  # type: ignore[list-item]
    with pytest.raises(CheckpointError, match="leads to 2 blocks"):
        check_sizes([wrap, blocks], {"h.inner.0.w": torch.ones(1)})  # type: ignore[list-item]


def test_masks_of_a_later_fit_are_found_on_what_was_put_in_place(tmp_path: Path) -> None:
    first = fit([ToySplit(at=2)], max_epochs=1)
    second = fit([ToyScale()], module=first.module, after=[every_epoch(tmp_path)], max_epochs=3)
    again = fit([ToyScale()], resume=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert_same(second, again, "uninterrupted against resumed in a new module")
    journal.take_back(again.module)
    assert type(again.module.model[0]) is nn.Linear, "the layer that left took its map with it"


class WrapNetwork(ToyWrap):
    path: ClassVar[str] = "model"

    def next_edit(self, run: Run) -> EditRequest | None:
        return None if journal.journal_of(run.module) else EditRequest(self.put(run.module, self.path, LowRankPair(2)))

    replacements = (LowRankPair,)


class Whole(LowRankPair):
    kind = "whole"

    def check(self, layer: nn.Module) -> None:
        pass


class WrapWhole(ToyWrap):
    replacements = (Whole,)

    def next_edit(self, run: Run) -> EditRequest | None:
        return None if journal.journal_of(run.module) else EditRequest(self.put(run.module, "model", Whole(2)))


def test_the_network_and_mapped_layers_are_not_replaced_under_the_methods() -> None:
    with pytest.raises(MisconfigurationException, match="replace model, the network that methods watch"):
        fit([WrapWhole()])
    with pytest.raises(MisconfigurationException, match=r"weight map of ToyScale.*exclude=\['model\.0'\]"):
        fit([ToySplit(), ToyScale()])
    fit([ToySplit(), ToyScale(exclude=["model.0"])])


def test_a_projection_that_is_never_called_is_not_replaced() -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(CheckpointError, match="is never called"):
        put_edit(net, "attention.out_proj", LowRankPair(1))


def frozen_layer_learns() -> Fit:
    class Frozen(Plain):
        def build(self) -> None:
            super().build()
            self.model[0].requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    return fit([ToyWrap(at=1)], style=Frozen, max_epochs=1)


def test_what_is_put_round_a_frozen_layer_is_trained() -> None:
    run = frozen_layer_learns()
    wrapped = run.module.model[0]
    assert not wrapped.layer.weight.requires_grad
    assert wrapped.up.weight.abs().sum() > 0


def two_ranks() -> dict[str, Any]:
    run = fit([ToyWrap(at=1)], max_epochs=1, accelerator="cpu", devices=2, strategy="ddp")
    return {name: tensor.tolist() for name, tensor in run.module.state_dict().items()}


def test_two_processes_put_the_same_module_in_place() -> None:
    first, second = run_ddp(f"{HERE}:two_ranks")
    assert "model.0.up.weight" in first
    assert first == second


def test_a_compiled_network_runs_what_was_put_into_it() -> None:
    torch.manual_seed(0)
    module = Plain("sgd")
    module.model.compile(backend="aot_eager")
    compiled = fit([ToyWrap(at=2)], module=module, max_epochs=1)
    torch._dynamo.reset()
    eager = fit([ToyWrap(at=2)], optimizer="sgd", max_epochs=1)
    for name, tensor in eager.module.state_dict().items():
        torch.testing.assert_close(compiled.module.state_dict()[name], tensor)


# split_low_rank


def lowered() -> Plain:
    torch.manual_seed(0)
    module = Plain()
    with torch.no_grad():
        module.model[2].weight.copy_(torch.outer(torch.randn(16), torch.randn(16)))
    return module


def test_a_split_network_is_rebuilt_from_its_files(tmp_path: Path) -> None:
    module = lowered()
    assert split_low_rank(module) == {"model.2": 1}
    run = fit([ToyThreshold(targets=["model.4"])], module=module, after=[every_epoch(tmp_path)], max_epochs=2)
    loaded = lightning_peft.load_from_checkpoint(Plain, tmp_path / "epoch=1.ckpt")
    assert torch.equal(loaded.eval()(PROBE), run.module.eval()(PROBE))
    resumed = fit([ToyThreshold(targets=["model.4"])], resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert_same(run, resumed, "uninterrupted against resumed in a module that its class builds whole")
    lightning_peft.save_baked(module, tmp_path / "folder")
    again = Plain()
    lightning_peft.load_baked(again, tmp_path / "folder")
    assert torch.equal(again.eval()(PROBE), run.module.eval()(PROBE))


def test_a_split_network_writes_plain_checkpoints_that_know_it_was_split(tmp_path: Path) -> None:
    module = lowered()
    split_low_rank(module)
    runner = trainer(max_epochs=1)
    runner.fit(module, loader(8), loader(8))
    runner.save_checkpoint(tmp_path / "plain.ckpt")
    loaded = lightning_peft.load_from_checkpoint(Plain, tmp_path / "plain.ckpt")
    assert torch.equal(loaded.eval()(PROBE), module.eval()(PROBE))


def test_a_split_keeps_no_copy_of_the_weight() -> None:
    module = lowered()
    split_low_rank(module)
    (change,) = journal.changes_of(module)
    assert all(tensor.is_meta for tensor in change.removed["model.2"].parameters())
    bias = module.model[2][1].bias
    journal.take_back(module)
    assert type(module.model[2]) is nn.Linear
    assert module.model[2].bias is not bias
    assert module.model[2].weight.abs().sum() == 0
