"""AdaLoRA: trained beside PEFT's, with its allocator called after every step; budgets, ranks, files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

import lightning_peft
from lightning_peft import AdaLoRA, LayerGrowth, Schedule, StructuredPruning
from lightning_peft.testing import MethodTester
from lightning_peft.testing.callbacks import StopAfter, every_epoch
from lightning_peft.testing.modules import Conv, Plain, deepened, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft_plugins.deltas import adalora
from lightning_peft_plugins.deltas._adalora.triplet_importance import TripletImportance
from lightning_peft_plugins.deltas._shared.triplet_form import TripletForm

WHOLE: dict[str, Any] = {"exclude": None, "checkpoint": "full"}


class TestAdaLoRA(MethodTester):
    every_one_sharded = True
    methods = [
        lambda: AdaLoRA(2, 1, tinit="25%", tfinal="25%", tune=("bias",), **WHOLE),
        lambda: AdaLoRA(3, 2, alpha=4, tfinal="25%", every=2, gamma=0, targets="all-weights", **WHOLE),
    ]


STEPS, TINIT, TFINAL = 12, 2, 3
BATCHES = torch.randn(STEPS, 6, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Network(nn.Module):
    """A convolution, two linear layers, and a loss, to which PEFT's model adds its penalty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.hidden, self.out = nn.Conv2d(3, 6, 3), nn.Linear(24, 9), nn.Linear(9, 8)
        self.double()

    def forward(self, images: Tensor) -> Any:
        said = self.out(self.hidden(self.conv(images).tanh().flatten(1)).tanh())
        loss = (said - 1).square().mean()
        return SimpleNamespace(loss=loss, own=loss.item())


LAYERS = ["conv", "hidden", "out"]


class Tuned(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.losses = Network(), list[float]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        said = self.model(batch)
        self.losses.append(said.own)
        return said.loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=2e-2)


class Follows(Callback):
    """Gives our forms the factors that PEFT drew, and notes them after every step."""

    def __init__(self, method: AdaLoRA, drawn: dict[str, dict[str, Tensor]]) -> None:
        self.method, self.drawn, self.seen = method, drawn, list[dict[str, Tensor]]()

    def forms(self, module: LightningModule) -> dict[str, TripletForm]:
        return {name.split(".")[1]: form for name, form in self.method.forms(module)}

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for name, form in self.forms(pl_module).items():
                form.down.copy_(self.drawn[name]["down"].view_as(form.down))
                form.up.copy_(self.drawn[name]["up"])

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        found = {
            name: {key: value.detach().flatten(1 if key == "down" else 0).clone() for key, value in form.named_parameters()}
            for name, form in self.forms(pl_module).items()
        }
        self.seen.append({f"{name}.{key}": value.view(-1) for name, values in found.items() for key, value in values.items()})


def numbers_of(wrapped: Any) -> dict[str, dict[str, Tensor]]:
    kinds = {"down": "lora_A", "values": "lora_E", "up": "lora_B"}
    layers = {name: wrapped.get_submodule(f"base_model.model.{name}") for name in LAYERS}
    return {
        name: {key: getattr(layer, kind)["default"].detach().clone() for key, kind in kinds.items()}
        for name, layer in layers.items()
    }


@pytest.mark.parametrize(("every", "gamma"), [(1, 0.5), (2, 0.3)])
def test_every_step_is_that_of_peft(every: int, gamma: float) -> None:
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=TINIT,
        tfinal=TFINAL,
        deltaT=every,
        beta1=0.8,
        beta2=0.7,
        orth_reg_weight=gamma,
        total_step=STEPS,
        lora_alpha=6,
        target_modules=LAYERS,
    )
    wrapped: Any = peft.get_peft_model(Network(), config, autocast_adapter_dtype=False).double()  # type: ignore[arg-type]
    drawn = numbers_of(wrapped)
    # PEFT leaves `ranknum`, the rank under its scale, trainable by mistake, and adds its penalty in the model for a task only
    trained = [p for name, p in wrapped.named_parameters() if p.requires_grad and "ranknum" not in name]
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    theirs, losses = [], []
    for step, batch in enumerate(BATCHES):
        optimizer.zero_grad()
        said = wrapped.base_model(batch)
        losses.append(said.own)
        said.loss.backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step + 1)
        found = numbers_of(wrapped)
        theirs.append({f"{name}.{key}": value.view(-1) for name, numbers in found.items() for key, value in numbers.items()})

    method = AdaLoRA(4, 2, 6, TINIT, TFINAL, every, 0.8, 0.7, gamma, targets=LAYERS, exclude=None)
    module, follows = Tuned(), Follows(method, drawn)
    trainer(callbacks=[method, follows], precision="64-true").fit(module, BATCHES)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(losses), atol=1e-10, rtol=1e-10)
    masked = 0
    for ours, expected in zip(follows.seen, theirs, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-9)
        for name in LAYERS:
            assert torch.equal(ours[f"{name}.values"] == 0, expected[f"{name}.values"] == 0)
            masked += int((ours[f"{name}.values"] == 0).sum())
    assert masked > 20, "nothing was masked"
    assert method.ranks == {
        f"model.{name}.weight": sum(kept)
        for name in LAYERS
        for key, kept in wrapped.peft_config["default"].rank_pattern.items()
        if f".{name}." in f".{key}"
    }
    merged = wrapped.merge_and_unload().state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(module.model.state_dict()[name], value, atol=1e-10, rtol=1e-9)


@given(
    init=st.integers(2, 12),
    target=st.integers(1, 12),
    layers=st.integers(1, 40),
    tinit=st.integers(0, 30),
    tfinal=st.integers(0, 30),
    total=st.integers(62, 120),
)
def test_budgets_are_those_of_peft(init: int, target: int, layers: int, tinit: int, tfinal: int, total: int) -> None:
    target = min(init, target)
    allocator = object.__new__(RankAllocator)
    allocator.peft_config = SimpleNamespace(tinit=tinit, tfinal=tfinal, total_step=total, deltaT=1)  # type: ignore[assignment]
    allocator.init_bgt, allocator.target_bgt = init * layers, target * layers
    ours = Schedule(tinit, total - tfinal, "cubic", (init * layers, target * layers)).resolve(total)
    found = [int(ours.value(step)) for step in range(total + 1)]
    expected = [allocator.budget_schedule(step)[0] for step in range(total + 1)]
    # of a cube that is a whole number in theory, rounding decides
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 3


def form_of(down: list[list[float]], values: list[float], up: list[list[float]]) -> TripletForm:
    form = TripletForm(lightning_peft.deltas.layout.Layout(torch.Size([len(up), len(down[0])])), len(values))
    with torch.no_grad():
        for parameter, numbers in ((form.down, down), (form.values, values), (form.up, up)):
            parameter.copy_(torch.tensor(numbers))
            parameter.grad = torch.ones_like(parameter)
    return form


def test_importance_by_hand() -> None:
    """Gradients of one: |w g| is |w|. Averages with 1/2 and 1/4: w/2 and w/8 after a step, 3w/4 and 3w/32 + w/16 after two."""
    form = form_of([[2.0, -4.0]], [1.0], [[3.0], [5.0]])
    seen = TripletImportance(0.5, 0.75)
    assert seen.of({"w": form})["w"].tolist() == [0.0]
    seen.see({"w": form})
    one = lambda w: (w / 2) * (w / 2) / 4  # noqa: E731 - a formula
    expected = one(1) + (one(2) + one(4)) / 2 + (one(3) + one(5)) / 2
    assert seen.of({"w": form})["w"].tolist() == pytest.approx([expected])
    seen.see({"w": form})
    two = lambda w: (3 * w / 4) * ((w / 8) * 0.75 + (w / 4) * 0.25)  # noqa: E731
    expected = two(1) + (two(2) + two(4)) / 2 + (two(3) + two(5)) / 2
    assert seen.of({"w": form})["w"].tolist() == pytest.approx([expected])
    form.values.grad = None
    seen.see({"w": form})
    assert seen.of({"w": form})["w"].tolist() == pytest.approx([expected])


def test_a_scaled_gradient_is_seen_as_it_is() -> None:
    plain, scaled = TripletImportance(0.5, 0.5), TripletImportance(0.5, 0.5)
    form = form_of([[2.0, -4.0]], [1.0], [[3.0], [5.0]])
    plain.see({"w": form})
    for parameter in form.parameters():
        parameter.grad = parameter.grad * 1024  # type: ignore[operator]
    scaled.see({"w": form}, 1024.0)
    assert torch.equal(plain.of({"w": form})["w"], scaled.of({"w": form})["w"])


class Counts(Callback):
    """Notes how many values are not zero after every step."""

    def __init__(self, method: AdaLoRA) -> None:
        self.method, self.counts = method, list[int]()

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        self.counts.append(sum(int(form.values.count_nonzero()) for _, form in self.method.forms(pl_module)))


def test_values_beyond_the_budget_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(adalora, "rank_zero_info", said.append)
    method = AdaLoRA(3, 1, tinit=1, tfinal=2, **WHOLE)
    counts = Counts(method)
    fit([method], after=[counts], max_epochs=3)
    # 12 steps; 9 triplets until step 1, 3 from step 10: 3 + 6 (1 - (t - 1) / 9)^3, rounded down
    assert counts.counts == [9, *(int(3 + 6 * (1 - (t - 1) / 9) ** 3) for t in range(2, 10)), 3, 3, 3]
    assert sum(method.ranks.values()) == 3
    assert len(said) == 1
    assert said[0].startswith("ada_lora: the ranks at step 10 are final: ")


def test_a_file_for_peft_has_the_ranks_that_are_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Plain()
    method = AdaLoRA(3, 1, keep=True, **WHOLE)
    fit([method], module=module, max_epochs=2)
    inputs = torch.randn(4, 16)
    live = module.eval()(inputs)
    lightning_peft.save_peft(module, tmp_path / "adapter")
    ranks = {name: max(rank, 1) for name, rank in method.ranks.items()}
    assert sum(method.ranks.values()) == 3
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Plain().model, str(tmp_path / "adapter"))
    for name, rank in ranks.items():
        layer: Any = loaded.get_submodule(f"base_model.model.{name.split('.')[1]}")
        assert layer.lora_A["default"].weight.shape[0] == rank
    torch.testing.assert_close(loaded.eval()(inputs), live, atol=1e-6, rtol=1e-6)


def test_a_training_that_ends_before_the_final_choice_says_so() -> None:
    with pytest.warns(UserWarning, match="before the final choice of ranks at step 12"):
        fit([AdaLoRA(2, 1, **WHOLE)], max_epochs=3, after=[StopAfter()], expected=())


def with_a_cut() -> list[Any]:
    return [AdaLoRA(2, 1, tfinal="25%", targets="all-weights", **WHOLE), StructuredPruning(0.3, start=2)]


def test_goes_on_after_a_cut(tmp_path: Path) -> None:
    whole = fit(with_a_cut(), style=Conv, after=[every_epoch(tmp_path)], max_epochs=3)
    assert whole.module.model[1].out_channels < 8, "nothing was cut"
    assert sum(whole.methods[0].ranks.values()) == 4
    resumed = fit(with_a_cut(), style=Conv, resume=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert_same(whole, resumed, "uninterrupted against resumed after the cut")


@pytest.mark.parametrize("at", ["step:4", "step:10"])
def test_goes_on_in_a_network_that_grows(at: str) -> None:
    """Blocks that come before the final choice take part in it; copies that come after it are what their sources are."""
    method = AdaLoRA(2, 1, tfinal="25%", **WHOLE)
    counts = Counts(method)
    fit([method, LayerGrowth(at=at, start=2)], style=deepened(Plain), after=[counts], max_epochs=3)
    assert len(method.ranks) == 3 + 2 * 4
    assert counts.counts[-1] == sum(method.ranks.values())
    if at == "step:4":
        assert counts.counts[-1] == 11
    else:
        of_blocks = {name: rank for name, rank in method.ranks.items() if name.startswith("blocks.")}
        assert 0 in of_blocks.values()
        assert all(of_blocks[f"blocks.{int(name[7]) % 2}{name[8:]}"] == rank for name, rank in of_blocks.items())


def test_refusals_name_what_to_change() -> None:
    with pytest.raises(MisconfigurationException, match=r"from step 3 .* to step 2 .*smaller tinit= or tfinal="):
        fit([AdaLoRA(2, 1, tinit=3, tfinal=2, **WHOLE)])
    fit([AdaLoRA(2, 1, tinit=1, tfinal=2, **WHOLE)])
    for wrong, message in (
        ({"target": 3}, "from 1 to rank=2"),
        ({"beta1": 1.0}, "between 0 and 1"),
        ({"gamma": -1}, "leaves the penalty out"),
        ({"every": 0}, "every=0"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            AdaLoRA(**{"rank": 2, "target": 1, **wrong})


def test_stacks_of_experts_share_the_budget() -> None:
    class Experts(Plain):
        def build(self) -> None:
            super().build()
            self.model.insert(1, Mix())

    torch.manual_seed(0)
    module = Experts()
    method = AdaLoRA(2, 1, gamma=0.1, targets=["model.1", "model.0"], **WHOLE)
    counts = Counts(method)
    fit([method], module=module, after=[counts], max_epochs=2)
    assert counts.counts[-1] == 4 == sum(method.ranks.values())  # of three experts and a layer


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 16, 16) / 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", inputs, self.experts)
