"""FTWT in training: against the official rule and a training step by hand, and what its predictors come to know."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from lightning_peft import FTWT, LayerGrowth
from lightning_peft.functional import active_channels
from lightning_peft.network.channel_units import channel_units
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.modules import Conv, Plain, deepened, loader
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.weights.parts import put_part
from lightning_peft_plugins.pruning import ftwt
from lightning_peft_plugins.pruning._ftwt.channel_gate import ChannelGate, GateCut


class Picture(Plain):
    """Two convolutions with norms on a 4x4 image of one channel."""

    def build(self) -> None:
        layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), *layers, nn.Flatten(), nn.Linear(80, 3))


class PictureSGD(Picture):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def gated(task: Task) -> list[float]:
    """One gate, on the second convolution, in plain PyTorch."""
    model, losses = task.module.model, []
    weight, bias = (nn.Parameter(value) for value in (torch.zeros(5, 6), torch.ones(5)))
    task.optimizer.add_param_group({"params": [weight, bias], "lr": 0.2, "weight_decay": 0.0})
    for inputs, labels in task.batches:
        hidden = model[:4](inputs)
        logits = hidden.detach().mean((2, 3)).softmax(-1) @ weight.T + bias
        output = model[5](model[4](hidden))
        strength = output.detach().abs().amax((2, 3))
        share, order = (strength / strength.sum(1, keepdim=True)).sort(1, descending=True)
        kept = torch.zeros_like(strength).scatter(1, order, (share.cumsum(1) <= 0.6 + 1e-5).float())
        kept.scatter_(1, order[:, :1], 1.0)
        loss = cross_entropy(model[6:](output * (logits.detach() > 0)[:, :, None, None]), labels)
        losses.append(loss.item())
        task.step(loss + 0.5 * binary_cross_entropy_with_logits(logits, kept, reduction="none").sum(1).mean())
    return losses


def one_gate(**mass: Any) -> FTWT:
    return FTWT(**mass, strength=0.5, cooldown=None, lr_scale=4.0, exclude=["model.1"])


class TestFTWT(MethodTester):
    methods = [lambda: FTWT(0.8, tokens="sample", strength=0.1)]
    references = [
        Reference(gated, partial(one_gate, **mass), style=PictureSGD, tolerance=1e-4)
        for mass in ({"mass": 0.6}, {"mass": 0.9, "masses": {"all-conv": 0.3, "model.4": 0.6}})
    ]
    no_exact_bake = "the module keeps all its channels; deploy() gives the network that leaves some out"
    no_ordinary_file = "predictors gate channels in validation, and an ordinary network has none"


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(0.4, [1, 0, 0, 0]), (0.7, [1, 1, 0, 0]), (0.75, [1, 1, 0, 0]), (0.9, [1, 1, 1, 0]), (1.0, [1, 1, 1, 1])],
)
def test_official_vectors(keep: float, expected: list[int]) -> None:
    assert active_channels(torch.tensor([4.0, 3.0, 2.0, 1.0]), keep).tolist() == list(map(bool, expected))


def test_channels_without_activity_go_even_when_all_is_kept() -> None:
    assert active_channels(torch.tensor([1.0, 0.0, 2.0]), 1.0).tolist() == [True, False, True]


@given(  # strengths whose halves are subnormal are no activity of a network
    st.lists(st.just(0.0) | st.floats(2**-20, 10, width=32), min_size=1, max_size=12),
    st.floats(0.01, 1.0),
    st.sampled_from(["mass", "uniform"]),
)
def test_largest_channels_are_kept(strength: list[float], keep: float, criterion: Any) -> None:
    values = torch.tensor(strength)
    mask = active_channels(values, keep, criterion)
    assert mask.any()
    if not mask.all():
        assert values[mask].min() >= values[~mask].max()
    if criterion == "mass" and mask.sum() > 1:
        assert values[mask].sum() <= (keep + 1e-4) * values.sum()
    torch.testing.assert_close(active_channels(torch.stack([values, values]), keep, criterion), torch.stack([mask, mask]))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.LeakyReLU(), nn.Tanh()], ids=str)
def test_activity_is_that_of_the_activated_map(activation: nn.Module) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), activation, nn.Conv2d(6, 2, 1))
    unit = channel_units(network)[0]
    gate = ChannelGate(1, 6, keep=0.6)
    gate.place(network[0], network[1], unit.activations)
    put_part(network, "0", gate)
    put_part(network, "1", GateCut(gate))
    gate.open = True
    images = 5 * torch.randn(8, 1, 9, 9)
    hidden = network[:3](images)
    (call,) = gate.take()
    torch.testing.assert_close(call.target, active_channels(hidden.detach().abs().amax((2, 3)), 0.6))


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.predictors: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        keys = ("active", "agreement", "cost")
        metrics = trainer.callback_metrics
        self.seen.append({key: float(metrics[f"peft/ftwt/{key}"]) for key in keys if f"peft/ftwt/{key}" in metrics})
        self.predictors.append(
            torch.cat([p.detach().flatten() for n, p in pl_module.named_parameters() if "predictor" in n]).clone()
        )


def test_predictors_learn_and_then_stay() -> None:
    watch = Watch()
    method = FTWT(0.7, normalise="standard", cooldown="50%", lr_scale=2.0)
    fit([method], after=[watch], style=Picture, max_epochs=30, log_every_n_steps=1)
    half = len(watch.predictors) // 2
    assert torch.equal(watch.predictors[half], watch.predictors[-1])
    assert not torch.equal(watch.predictors[half - 2], watch.predictors[half - 1])
    first, last = watch.seen[0], watch.seen[-1]
    assert first["active"] == 1.0
    assert last["active"] < 0.95
    assert last["agreement"] > max(0.7, first["agreement"])
    assert last["cost"] < 1.0


@pytest.mark.parametrize("decoupled", [True, False])
def test_only_the_joint_loss_reaches_the_layers_below(decoupled: bool) -> None:
    class OnlyPredictors(Picture):
        def base_loss(self, batch: Any) -> Tensor:
            return 0.0 * super().base_loss(batch)

    before = fit([], style=OnlyPredictors, max_epochs=1).module.model[1].weight
    method = FTWT(0.6, cooldown=None, decoupled=decoupled, normalise="standard", exclude=["model.1"])
    after = fit([method], style=OnlyPredictors, max_epochs=1).module.model[1].weight
    assert torch.equal(before, after) == decoupled


def test_a_frozen_network_learns_predictors() -> None:
    class Frozen(Picture):
        def build(self) -> None:
            super().build()
            self.model[1].requires_grad_(False)

    watch = Watch()
    fit([FTWT(0.7)], after=[watch], style=Frozen, max_epochs=2)
    assert not torch.equal(watch.predictors[0], watch.predictors[3])


def test_savings_are_announced_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, int]] = []
    method = FTWT(0.5, masses={"model.1": 0.75})
    monkeypatch.setattr(ftwt, "rank_zero_info", lambda text: said.append((text, method.steps)))
    fit([method], style=Picture, max_epochs=1)
    ((text, steps),) = said
    assert "keeping 50% to 75% by mass" in text
    assert "0.0 MFLOPs a sample" in text
    assert steps == 0


def test_arguments_are_checked() -> None:
    for wrong, message in [
        ({"mass": 0.0}, "mass=0.0 must be the share"),
        ({"mass": 1.5}, "above 0 and at most 1"),
        ({"masses": {"all-conv": 2.0}}, "mass=2.0 must be the share"),
        ({"criterion": "best"}, "criterion='best' is unknown"),
        ({"normalise": "none"}, "normalise='none' is unknown"),
        ({"tokens": "all"}, "tokens='all' is unknown"),
        ({"strength": 0.0}, "must be positive"),
    ]:
        with pytest.raises(MisconfigurationException, match=message):
            FTWT(**wrong)


def test_a_copy_made_within_a_step_takes_nothing_of_its_graph_along() -> None:
    """Meta-learning copies its network in every step, when the gates have just seen it called."""

    class Copies(Conv):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            twin = copy.deepcopy(self.model)
            assert not any(tensor.grad_fn is not None for tensor in tensors_in(twin))
            return loss

    run = fit([FTWT(0.5)], style=Copies, max_epochs=2)
    assert_same(fit([FTWT(0.5)], style=Conv, max_epochs=2), run, "without copies against with them")


def tensors_in(module: nn.Module) -> Iterator[Tensor]:
    """Tensors on modules and in lists on them, whatever they are called."""
    for part in module.modules():
        for value in vars(part).values():
            for each in value if isinstance(value, list) else [value]:
                yield from (entry for entry in (each if isinstance(each, tuple) else (each,)) if isinstance(entry, Tensor))


def test_the_structure_must_stay() -> None:
    with pytest.raises(
        MisconfigurationException, match="ftwt relies on the structure of the network, which layer_growth changes"
    ):
        fit([FTWT(tokens="each"), LayerGrowth(start=1, to=2, at="step:2")], style=deepened(Plain))


def test_networks_without_units_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="linear layers are gated with tokens="):
        fit([FTWT()], data=loader())


def test_masses_of_layers_that_are_not_gated_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"masses=\{'model\.7': \.\.\.\} matches no layer among"):
        fit([FTWT(masses={"model.7": 0.5})], style=Picture)


def test_layers_that_are_not_called_are_named() -> None:
    class Unused(Picture):
        def build(self) -> None:
            super().build()
            self.model.add_module("spare", nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)))

        def forward(self, inputs: Tensor) -> Tensor:
            output: Tensor = self.model[:-1](inputs) if float(inputs[0, 0]) > -1e9 else self.model(inputs)
            return output

        def logits(self, inputs: Tensor) -> Tensor:
            return self(inputs)

    with pytest.raises(MisconfigurationException, match=r"model\.spare\.0 was not called in this training step"):
        fit([FTWT()], style=Unused)


def test_the_cool_down_begins_with_the_step_that_is_named() -> None:
    method = FTWT(0.8, cooldown=4)
    fit([method], style=Conv, max_epochs=1)
    assert [method._is_frozen(step) for step in (3, 4, 5)] == [False, True, True]


class Experts(Plain):
    """Sends each sample to one of three experts, to the last of them none."""

    def build(self) -> None:
        experts = (nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3))
        self.model = nn.ModuleDict({"start": nn.Linear(16, 16), "experts": nn.ModuleList(experts)})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.model["start"](inputs).unsqueeze(1).expand(-1, 2, -1).reshape(-1, 16)
        places = (inputs[:, 0] > 0).long().repeat_interleave(2)
        output = hidden.new_zeros(len(hidden), 3)
        for place, expert in enumerate(self.model["experts"]):
            output = output.index_put(((places == place).nonzero().flatten(),), expert(hidden[places == place]))
        return output.view(-1, 2, 3).mean(1)


def test_experts_that_get_some_tokens_or_none() -> None:
    method = FTWT(0.5, tokens="sample", cooldown=None)
    run = fit([method], style=Experts)
    assert all(bool(value.isfinite().all()) for value in run.module.state_dict().values())
    assert 0.0 < method.predicted < 1.0
    metrics = {name: value for name, value in run.trainer.callback_metrics.items() if name.startswith("peft/")}
    assert metrics
    assert all(bool(value.isfinite()) for value in metrics.values())
