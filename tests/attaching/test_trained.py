"""What methods name is trained, everything else is frozen for the fit, and frozen weights are left alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging
from torch import Tensor, nn

import lightning_peft
from lightning_peft import PERP, LayerGrowth, MagnitudePruning, NMSparsity, TrainedRankPruning, WeightCompander
from lightning_peft.testing.callbacks import FailAt, PlannedError, every_epoch
from lightning_peft.testing.ddp import run_ddp
from lightning_peft.testing.modules import Configured, Manual, Plain, TwoOptimizers, deepened, loader, trainer
from lightning_peft.testing.runs import assert_clean, assert_same, fit
from lightning_peft.testing.toys import ToyEntropy, ToyGate, ToyScale, ToyThreshold, ToyTuning

BIASES = ["model.0.bias", "model.2.bias", "model.4.bias"]


class Decaying(Plain):
    """Would move everything it may."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.5)


class Filtered(Plain):
    """Asks what is trainable, as fine-tuning code does."""

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


class Look(Callback):
    """Which parameters can be trained at each step, and how the module was first."""

    def __init__(self) -> None:
        self.trained: list[list[str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append([name for name, p in pl_module.named_parameters() if p.requires_grad])


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(style: type[Plain], methods: list[Any], **settings: Any) -> list[str]:
    torch.manual_seed(0)
    module = style()
    before = values(module) if style is not Configured else {}
    fit(methods, module=module, **settings)
    return [name for name, value in values(module).items() if name in before and not torch.equal(value, before[name])]


@pytest.mark.parametrize("style", [Plain, Decaying, Filtered, Manual, TwoOptimizers], ids=lambda style: style.__name__)
def test_only_what_is_named_moves(style: type[Plain]) -> None:
    look = Look()
    names = [*BIASES, "generator.bias"] if style is TwoOptimizers else BIASES
    assert moved(style, [ToyTuning()], after=[look]) == names
    assert look.trained == [names] * 4


def test_biases_alone_as_a_plain_loop_trains_them() -> None:
    torch.manual_seed(0)
    module, twin = Plain("sgd"), Plain("sgd")
    twin.load_state_dict(module.state_dict())
    optimizer = torch.optim.SGD([p for name, p in twin.named_parameters() if name.endswith("bias")], lr=twin.lr)
    for inputs, labels in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin.model(inputs), labels).backward()
        optimizer.step()
    fit([ToyTuning()], module=module)
    for name, value in values(module).items():
        torch.testing.assert_close(value, values(twin)[name])


def test_everything_is_given_back() -> None:
    class Partly(Plain):
        def build(self) -> None:
            super().build()
            self.model[2].bias.requires_grad_(False)

    for style in (Plain, Configured):
        assert_clean(fit([ToyTuning()], style=style).module, "ToyTuning")
    for step in (0, 2):
        module = Plain()
        with pytest.raises(PlannedError):
            fit([ToyTuning()], module=module, after=[FailAt(step)])
        assert_clean(module, f"an exception before step {step}")
    module = fit([ToyTuning()], style=Partly).module
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["model.2.bias"]


def test_several_methods_name_together_and_maps_follow() -> None:
    """The reparametrisation of a frozen weight is frozen with it; masks and terms beside it act."""
    look = Look()
    methods = [ToyTuning(), ToyTuning("4.weight", name="head"), ToyScale(), ToyThreshold(), ToyEntropy()]
    fit(methods, after=[look], max_epochs=2)
    head = "model.4.parametrizations.weight.0.scale"
    assert [set(names) for names in look.trained] == [{*BIASES, "model.4.weight", head}] * 8


@pytest.mark.parametrize("style", [Plain, Filtered], ids=["all", "filtered"])
@pytest.mark.parametrize("averaged", [False, True])
def test_resumes_with_and_without_an_average(style: type[Plain], averaged: bool, tmp_path: Path) -> None:
    def run(**settings: Any) -> Any:
        others = [EMAWeightAveraging(decay=0.5)] if averaged else []
        after = [*others, *settings.pop("after", [])]
        return fit([ToyTuning(), ToyScale(), ToyThreshold()], style=style, max_epochs=3, after=after, **settings)

    whole = run(after=[every_epoch(tmp_path)])
    assert_same(whole, run(resume=tmp_path / "epoch=0.ckpt", seed=4), "uninterrupted against resumed")


@pytest.mark.parametrize("settings", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_with_amp_accumulation_and_clipping(settings: dict[str, Any]) -> None:
    assert moved(Plain, [ToyTuning()], **settings) == BIASES


def test_a_network_that_grows(tmp_path: Path) -> None:
    """New blocks are asked about, resumed ones too."""
    look = Look()

    def methods() -> list[Any]:
        return [ToyTuning(), LayerGrowth(start=1, to=2, at="step:2")]

    style = deepened(Plain)
    whole = fit(methods(), style=style, after=[look, every_epoch(tmp_path)], max_epochs=2)
    assert all(name.endswith("bias") for names in look.trained for name in names)
    assert len(look.trained[0]) < len(look.trained[-1])
    assert all(p.requires_grad for p in whole.module.parameters())
    resumed = fit(methods(), style=style, seed=3, resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert_same(whole, resumed, "uninterrupted against resumed, grown")


def on_rank() -> dict[str, Any]:
    module = fit([ToyTuning(), ToyThreshold()], strategy="ddp", devices=2, accelerator="cpu").module
    return {name: (p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()}


def test_two_processes_and_stock_ddp() -> None:
    """DDP looks for no unused parameters, so what is frozen must be so when it wraps the module."""
    first, second = run_ddp(f"{__file__}:on_rank")
    torch.manual_seed(0)
    before = dict(Plain().named_parameters())
    for name, (value, trainable) in first.items():
        assert torch.equal(value, second[name][0])
        assert trainable
        assert name in BIASES or torch.equal(value == 0, before[name].abs() < 0.05)


def test_what_cannot_be_trained_is_refused() -> None:
    class Missing(ToyTuning):
        def trained(self, module: nn.Module) -> list[str]:
            return ["model.0.bais"]

    module = Plain()
    with pytest.raises(
        MisconfigurationException, match=r"names 'model\.0\.bais', which Plain does not have\. Nearest: model\.0\.bias"
    ):
        fit([Missing()], module=module)
    assert_clean(module, "a refusal")
    frozen = Plain()
    for name in BIASES:
        frozen.get_parameter(name).requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"toy_tuning names only parameters of .* requires_grad_\(True\)"):
        fit([ToyTuning()], module=frozen)
    assert [name for name, p in frozen.named_parameters() if not p.requires_grad] == BIASES
    for name in BIASES:
        frozen.get_parameter(name).requires_grad_(True)
    fit([ToyTuning()], module=frozen)

    class Weights(Plain):
        def configure_optimizers(self) -> Any:
            return self.make_optimizer([p for name, p in self.named_parameters() if name.endswith("weight")])

    with pytest.raises(MisconfigurationException, match=r"model\.0\.bias is to be trained, but no optimizer has it"):
        fit([ToyTuning()], style=Weights)


# Frozen by the user.


class Backbone(Plain):
    """A network of which only the head is trained."""

    def build(self) -> None:
        super().build()
        self.model[:4].requires_grad_(False)


@pytest.mark.parametrize(
    "method",
    [
        lambda **targets: MagnitudePruning(0.5, end=None, exclude=(), **targets),
        lambda **targets: NMSparsity("2:4", "ste", exclude=(), **targets),
        lambda **targets: TrainedRankPruning(0.5, period=1, exclude=(), **targets),
        lambda **targets: ToyThreshold(**targets),
    ],
    ids=["magnitude", "nm", "rank", "toy"],
)
def test_frozen_weights_are_left_alone_unless_named(method: Any) -> None:
    assert moved(Backbone, [method()]) == ["model.4.weight", "model.4.bias"]
    assert "model.0.weight" in moved(Backbone, [method(targets=["model.0", "model.4"])])
    text = str(lightning_peft.plan(Backbone(), [method()]))
    assert "leaves 2 frozen alone (model.0, model.2)" in text
    assert "frozen" not in str(lightning_peft.plan(Plain(), [method()]))


def test_a_reparametrisation_leaves_them_alone() -> None:
    look: list[Any] = []

    class Keys(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            look.extend(name for name in pl_module.state_dict() if name.endswith("original"))

    fit([WeightCompander()], style=Backbone, after=[Keys()])
    assert look == ["model.4.parametrizations.weight.original"]


def test_parts_train_unless_their_own_method_names_others() -> None:
    class Choosing(ToyGate):
        def trained(self, module: nn.Module) -> list[str]:
            return [name for name, _ in module.named_parameters() if name.startswith("model.0") and "gate" in name]

    for gates, layers in ((ToyGate(), "024"), (Choosing(name="toy_gate"), "0")):
        look = Look()
        fit([ToyTuning(), gates], after=[look])
        assert look.trained[0] == [*BIASES, *(f"model.{layer}.layer_parts.toy_gate:toy_gate.gate" for layer in layers)]


def test_all_frozen_is_refused_with_the_way_out() -> None:
    module = Plain()
    module.requires_grad_(False)
    module.model[4].bias.requires_grad_(True)
    match = r"all that targets='all-linear' selects are frozen.*targets=\['model\.0', 'model\.2', 'model\.4'\]"
    with pytest.raises(MisconfigurationException, match=match):
        fit([ToyThreshold()], module=module)
    fit([ToyThreshold(targets=["model.0", "model.2", "model.4"])], module=module)
    assert (module.model[0].weight == 0).any()


def test_what_the_engine_freezes_is_pruned_and_what_a_finetuning_callback_freezes_too() -> None:
    torch.manual_seed(0)
    module = Plain()
    fit([ToyTuning(), ToyThreshold()], module=module)
    assert all((layer.weight == 0).any() for layer in module.model[::2])

    class WithBackbone(Plain):
        def build(self) -> None:
            super().build()
            self.backbone = self.model[:4]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02)

    run = fit([ToyThreshold()], style=WithBackbone, before=[BackboneFinetuning(1, verbose=False)], max_epochs=2)
    assert all((layer.weight == 0).any() for layer in run.module.model[::2])


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning")
def test_an_evaluation_of_a_frozen_network(tmp_path: Path) -> None:
    """Files of a training that left the backbone alone, evaluated by a module like it, and by one frozen as a whole."""
    fit([ToyThreshold()], style=Backbone, after=[every_epoch(tmp_path)])
    path = tmp_path / "epoch=0.ckpt"
    plain = Backbone.load_from_checkpoint(path, weights_only=True)
    wanted = plain.eval().logits(next(iter(loader(8)))[0])
    whole = Backbone()
    whole.freeze()
    for module in (Backbone(), whole):
        found: Any = trainer(callbacks=[ToyThreshold()]).predict(module, loader(8), ckpt_path=path, weights_only=True)
        assert torch.equal(found[0], wanted)


def test_low_rank_maps_train_beside_what_was_frozen() -> None:
    """A delta is there for that: PERP maps what its owner froze."""
    torch.manual_seed(0)
    module = Backbone()
    before = values(module)
    fit([PERP(exclude=())], module=module)
    changed = [name for name, value in values(module).items() if not torch.equal(value, before[name])]
    assert changed == [name for name in itertools.chain(before) if name not in ("model.0.bias", "model.2.bias")]


class Carries(Plain):
    """Meta-learning by hand: adds to the gradient of every parameter."""

    asks = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = lightning_peft.apply_terms(self, super().training_step(batch, batch_idx))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        for parameter in self.model.parameters():
            if not self.asks or parameter.grad is not None:
                parameter.grad += parameter.grad.clone()
        optimizer.step()


def test_a_step_that_needs_all_gradients_is_told_why_some_are_missing_and_the_advice_works() -> None:
    words = r"Carries.training_step failed: .*NoneType.* 3 parameters are frozen .*\(if parameter\.grad is not None"
    with pytest.raises(MisconfigurationException, match=words):
        fit([ToyTuning()], style=Carries)
    module = Carries()
    module.asks = True
    assert fit([ToyTuning()], module=module).module is module


def test_an_error_of_the_step_itself_stays_what_it_is() -> None:
    class Wrong(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise TypeError("of my own")

    with pytest.raises(TypeError, match="of my own"):
        fit([ToyTuning()], style=Wrong)


class Turns(ToyTuning):
    """Trains one layer after the other, by the step."""

    def __init__(self, layers: tuple[str, ...], every: int = 2, name: str | None = None) -> None:
        super().__init__(name=name)
        self.layers, self.every = layers, every
        self._turn = -1

    def next_trained(self, run: Any) -> bool:
        before, self._turn = self._turn, run.step // self.every
        return self._turn != before

    def trained(self, module: nn.Module) -> Any:
        layer = None if self._turn < 0 else self.layers[self._turn % len(self.layers)]
        return None if layer is None else [name for name, _ in module.named_parameters() if name.startswith(layer)]


class Stateful(Look):
    """What an optimizer keeps state for after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[set[str]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        names = {p: name for name, p in pl_module.named_parameters()}
        self.kept.append({names[p].rpartition(".")[0] for p, state in trainer.optimizers[0].state.items() if state})


def test_methods_that_take_turns_are_all_asked_and_frozen_layers_keep_no_state() -> None:
    look = Stateful()
    methods = [Turns(("model.0", "model.2"), name="first"), Turns(("model.4", "model.2"), every=3, name="second")]
    run = fit(methods, after=[look], max_epochs=2)
    first = ["model.0"] * 2 + ["model.2"] * 2 + ["model.0"] * 2 + ["model.2"] * 2
    second = ["model.4"] * 3 + ["model.2"] * 3 + ["model.4"] * 2
    assert look.kept == [{one, other} for one, other in zip(first, second, strict=True)]
    assert all({name.rpartition(".")[0] for name in names} == kept for names, kept in zip(look.trained, look.kept, strict=True))
    assert all(p.requires_grad for p in run.module.parameters())


def test_turns_of_what_no_optimizer_has_are_refused() -> None:
    class Partly(Plain):
        def configure_optimizers(self) -> Any:
            return self.make_optimizer(self.model[:3].parameters())

    with pytest.raises(MisconfigurationException, match=r"model\.4\.weight is to be trained, but no optimizer has it"):
        fit([Turns(("model.0", "model.4"))], style=Partly)
    fit([Turns(("model.0", "model.2"))], style=Partly)


def test_turns_resume_and_accumulate(tmp_path: Path) -> None:
    """Files are saved within a turn; a turn never begins within a window of accumulation."""

    def methods() -> list[Any]:
        return [Turns(("model.0", "model.2", "model.4"), every=3)]

    whole = fit(methods(), after=[every_epoch(tmp_path)], max_epochs=3)
    for epoch in (0, 1):
        resumed = fit(methods(), resume=tmp_path / f"epoch={epoch}.ckpt", seed=3, max_epochs=3)
        assert_same(whole, resumed, f"uninterrupted against resumed after epoch {epoch}")
    look = Stateful()
    fit(methods(), after=[look], max_epochs=6, accumulate_grad_batches=2)
    assert [names[0] for names in look.trained] == [f"model.{place}.weight" for place in (0, 2, 4, 0) for _ in range(6)]
