"""Networks that get wider, and deeper, in training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from growth_toys import grow
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from test_resume import OPTIMIZERS, VARIED, check_resume
from torch import Tensor, nn

import lightning_peft
from lightning_peft import LayerGrowth, NMSparsity, WeightCompander
from lightning_peft.structure.width_map import Layer, WidthMap
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import CLASSES, Plain, loader, trainer


class TinyViT(Plain):
    """A Vision Transformer on 4 x 4 images."""

    width, depth, optimizer = 12, 2, staticmethod(OPTIMIZERS["adamw"])

    def build(self) -> None:
        small = {"img_size": 4, "patch_size": 2, "in_chans": 1, "num_classes": CLASSES, "num_heads": self.width // 4}
        self.model = timm.create_model("vit_tiny_patch16_224", embed_dim=self.width, depth=self.depth, **small)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs.view(-1, 1, 4, 4))

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class DoubleViT(TinyViT):
    """The same in float64 from the start: Lightning's ``64-true`` converts after averages were made."""

    def build(self) -> None:
        super().build()
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.double())


class LargeViT(TinyViT):
    width, depth = 20, 4


TO = {"width": 20, "depth": 4}


class Outputs(Callback):
    """What the network computes right before and right after each growth."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look(pl_module)

    def look(self, module: Any) -> None:
        size = sum(parameter.numel() for parameter in module.parameters())
        probe = copy.deepcopy(module).double().eval()
        with torch.no_grad():
            self.seen.append((size, probe(torch.linspace(-1, 1, 48).double().view(3, 16))))


@pytest.mark.parametrize("operator", ["lemon", "net2net", "fpi", "aki"])
def test_resumes_bit_for_bit(operator: str, tmp_path: Path) -> None:
    run = check_resume(lambda: [LayerGrowth(operator, at="step:6", to=TO)], tmp_path, style=TinyViT)
    shapes = {name: tensor.shape for name, tensor in run.module.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in LargeViT().state_dict().items()}


@pytest.mark.parametrize(("optimizer", "rule"), [*((name, "copy") for name in OPTIMIZERS), *((name, "pad") for name in VARIED)])
def test_states_of_every_optimizer_widen(optimizer: str, rule: str, tmp_path: Path) -> None:
    class Optimized(TinyViT):
        pass

    Optimized.optimizer = staticmethod(OPTIMIZERS[optimizer])
    check_resume(lambda: [LayerGrowth("lemon", at="step:6", to=TO, optimizer_state=rule)], tmp_path, style=Optimized)


def test_lemon_changes_nothing_in_the_middle_of_training() -> None:
    watch = Outputs()
    grow([LayerGrowth("lemon", at="step:6", to=TO)], style=TinyViT, after=[watch], precision="64-true")
    steps = [(a, b) for (n, a), (m, b) in zip(watch.seen, watch.seen[1:], strict=False) if n != m]
    assert len(steps) == 1
    assert (steps[0][0] - steps[0][1]).abs().max() <= 1e-12


def test_loss_is_continuous_without_learning_rate(tmp_path: Path) -> None:
    class Still(TinyViT):
        optimizer = staticmethod(lambda p: torch.optim.SGD(p, lr=0.0))

    run = grow([LayerGrowth("lemon", at=["step:4", "step:8"], to=[{"width": 20}, 4])], style=Still, precision="64-true")
    losses = torch.tensor(run.losses, dtype=torch.float64).view(3, 4)
    assert (losses - losses[0]).abs().max() <= 1e-6  # logged in float32


def test_averages_widen_too(tmp_path: Path) -> None:
    check = {"averaged": True, "style": TinyViT}
    check_resume(lambda: [LayerGrowth("lemon", at="step:6", to=TO)], tmp_path, **check)


def test_average_of_a_lossless_growth_computes_what_it_did() -> None:
    class Averages(Callback):
        seen: list[tuple[int, Tensor]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            average = next(c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))._average_model.module
            probe = copy.deepcopy(average).double().eval()
            with torch.no_grad():
                self.seen.append((sum(p.numel() for p in probe.parameters()), probe(torch.ones(1, 16).double())))

        on_train_batch_start = on_train_batch_end

    watch, ema = Averages(), EMAWeightAveraging(decay=0.9)
    grow([LayerGrowth("lemon", at="step:6", to=TO)], style=DoubleViT, before=[ema], after=[watch])
    steps = [(a, b) for (n, a), (m, b) in zip(watch.seen, watch.seen[1:], strict=False) if n != m]
    assert len(steps) == 1
    assert (steps[0][0] - steps[0][1]).abs().max() <= 1e-12


def test_with_masks_and_maps(tmp_path: Path) -> None:
    def methods() -> Any:
        return [NMSparsity("2:4", exclude=("head",)), WeightCompander(), LayerGrowth("lemon", at="step:6", to=TO)]

    run = check_resume(methods, tmp_path, style=TinyViT)
    weight = run.module.model.blocks[3].mlp.fc1.weight
    assert (weight.view(-1, 4) != 0).sum(1).eq(2).all()


def test_loads_into_a_small_and_into_a_large_network(tmp_path: Path) -> None:
    run = grow([LayerGrowth("lemon", at="step:6", to=TO)], style=TinyViT, after=[every_epoch(tmp_path)])
    probe = torch.linspace(-1, 1, 48).view(3, 16)
    expected = run.module.eval()(probe)
    path = tmp_path / "epoch=2.ckpt"
    assert torch.equal(lightning_peft.load_from_checkpoint(TinyViT, path).eval()(probe), expected)
    assert torch.equal(lightning_peft.load_from_checkpoint(LargeViT, path).eval()(probe), expected)
    lightning_peft.bake_checkpoint(path, tmp_path / "baked.ckpt")
    plain = LargeViT.load_from_checkpoint(tmp_path / "baked.ckpt", weights_only=True)
    difference = (plain.eval()(probe) - expected).abs().max()  # plain Lightning cannot know that LEMON scales epsilon
    assert 0 < difference < 1e-3


def test_a_network_of_ones_own() -> None:
    class MLP(Plain):
        def build(self) -> None:
            self.model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    hidden = WidthMap({"hidden": 8}, {"0": Layer(output="hidden"), "2": Layer(input="hidden")})
    run = grow([LayerGrowth("net2net", at="step:6", to={"hidden": 16}, width_map=hidden)], style=MLP)
    assert run.module.model[0].weight.shape == (16, 16)
    assert run.module.model[2].in_features == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operator": "stack", "to": {"width": 24}}, "deepens only. Operators that widen: net2net"),
        ({"operator": "lemon", "to": {"width": 8}}, "width"),
        ({"operator": "lemon", "to": {"width": 18}}, "18"),
        ({"operator": "lemon", "to": {"girth": 18}}, "girth"),
        ({"operator": "lemon", "to": {"depth": 5}}, "at most doubles"),
        ({"operator": "lemon", "to": {"depth": 1}}, "cannot grow"),
        ({"operator": "lemon", "to": {"width": 0}}, "positive number"),
    ],
)
def test_bad_sizes_are_refused_before_anything_is_touched(arguments: Any, message: str) -> None:
    module = TinyViT()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        grow([LayerGrowth(at="step:2", **arguments)], module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_unknown_networks_ask_for_a_map() -> None:
    with pytest.raises(MisconfigurationException, match="width_map"):
        grow([LayerGrowth("lemon", at="step:2", to={"width": 24})], style=Plain)


MASKED = {"at": ["step:2", "step:6"], "to": [{"width": 16, "depth": 3}, {"depth": 4}], "grow_time": 3}


def test_masked_growth_changes_nothing_when_it_happens() -> None:
    watch = Outputs()
    grow([LayerGrowth("msg", **MASKED)], style=DoubleViT, after=[watch])
    steps = [(a, b) for (n, a), (m, b) in zip(watch.seen, watch.seen[1:], strict=False) if n != m]
    assert len(steps) == 2
    assert all((before - after).abs().max() <= 1e-12 for before, after in steps)


@pytest.mark.parametrize("averaged", [False, True])
def test_masked_growth_resumes(averaged: bool, tmp_path: Path) -> None:
    """Epochs end in the middle of both masks (steps 4 and 8)."""
    run = check_resume(lambda: [LayerGrowth("msg", **MASKED)], tmp_path, style=TinyViT, averaged=averaged)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in run.module.modules())
    assert len(run.module.model.blocks) == 4


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning")
def test_masked_growth_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    class Losses(Callback):
        logged: list[float] = []

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.logged.append(float(trainer.callback_metrics["loss"]))

    class Validated(TinyViT):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        test_step = validation_step

    watch = Losses()
    grow([LayerGrowth("msg", **MASKED)], style=Validated, after=[watch, every_epoch(tmp_path)])
    for epoch in range(3):
        runner = trainer(callbacks=[LayerGrowth("msg", **MASKED)])
        (tested,) = runner.test(Validated(), loader(8), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False)
        assert tested["loss"] == pytest.approx(watch.logged[epoch], abs=1e-6)


def test_a_fit_that_ends_behind_a_mask_says_so() -> None:
    with pytest.warns(UserWarning, match=r"mask of the last growth at 0\.\d\d.*grow_time"):
        grow([LayerGrowth("msg", at="step:2", to=4, grow_time=100)], style=TinyViT)


@pytest.mark.parametrize("to", [{"width": 20}, {"depth": 4}, TO])
def test_ligo_learns_its_operator_and_resumes(to: Any, tmp_path: Path) -> None:
    def methods() -> Any:
        return [LayerGrowth("ligo", at="step:6", to=to, operator_steps=4)]

    run = check_resume(methods, tmp_path, style=TinyViT, averaged=True)
    assert run.module.model.embed_dim == to.get("width", 12)


def test_ligo_leaves_no_trace_in_the_log() -> None:
    seen = []

    class Log(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(set(vars(pl_module)) & {"log", "log_dict"})

    run = grow([LayerGrowth("ligo", at="step:2", to=4, operator_steps=3)], style=TinyViT, after=[Log()])
    assert not any(seen)
    assert len(run.losses) == 12


def test_ligo_says_what_it_cannot_do() -> None:
    with pytest.raises(MisconfigurationException, match="under the weight map of WeightCompander"):
        grow([LayerGrowth("ligo", at="step:2", to=4), WeightCompander()], style=TinyViT)
