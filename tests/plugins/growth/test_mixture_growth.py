"""MixtureGrowth: two members in one network, and their fusion."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from growth_toys import grow, values
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import MixtureGrowth, NMSparsity, StageSharing, WeightCompander, bake
from lightning_peft.testing import MethodTester
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import FEATURES, Plain, TwoOptimizers, loader
from lightning_peft.testing.runs import assert_same
from lightning_peft.testing.trace import difference
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft_plugins.growth._mixture_growth.halves import inner_layers
from lightning_peft_plugins.growth.functional.mixture import cross_coefficients, mix_templates, of_its_member
from lightning_peft_plugins.growth.mixture_growth import MixtureMap

SEVERAL = "several networks in one module: the one to grow is named with network="


class TestMixtureGrowth(MethodTester):
    methods = [
        lambda: MixtureGrowth(at="step:2"),
        lambda: MixtureGrowth(at="step:6", coefficients="copy", noise=0.1, lr="rewarm:3@0.5"),
        lambda: MixtureGrowth(at="step:3", coefficients="zero"),
    ]
    no_styles = {"TwoOptimizers": SEVERAL}
    no_teacher = r"is not two members side by side.*named by stem="


def test_one_network_of_several_is_named() -> None:
    with pytest.raises(MisconfigurationException, match=r"model\.4 \(Linear\) has an odd number of outputs"):
        grow([MixtureGrowth()], style=TwoOptimizers)
    grow([MixtureGrowth(at="step:2", network="model")], style=TwoOptimizers)


# Arithmetic.


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([(), (1,), (3, 3)]))
def test_mixing_is_the_matrix_of_the_paper(rows: int, columns: int, kernel: tuple[int, ...]) -> None:
    templates = torch.randn(2 * rows, 2 * columns, *kernel, dtype=torch.float64)
    shares = torch.randn(2, 2, 2, dtype=torch.float64)
    first, second = ([templates[m : m + rows, :columns], templates[m : m + rows, columns:]] for m in (0, rows))
    blocks = [
        [sum(c * t for c, t in zip(shares[m, j], ts, strict=True)) for j in (0, 1)] for m, ts in enumerate((first, second))
    ]
    expected = torch.cat([torch.cat(row, 1) for row in blocks])
    assert torch.allclose(mix_templates(templates, shares), expected, rtol=0, atol=1e-14)


def test_a_plain_weight_comes_back_bit_for_bit() -> None:
    weight = torch.randn(6, 4, 3, 3)
    weight_map = MixtureMap()
    assert torch.equal(weight_map(weight_map.right_inverse(weight)), weight)


@pytest.mark.parametrize("rule", ["orthogonal", "copy", "zero", "random"])
def test_new_coefficients(rule: str) -> None:
    own, generator = torch.tensor([0.6, -1.1]), torch.Generator().manual_seed(1)
    new = cross_coefficients(own, rule, 0.5, generator)
    if rule == "orthogonal":
        assert new @ own == pytest.approx(0, abs=1e-7)
        assert new.norm() == pytest.approx(0.5)
    elif rule == "copy":
        assert (new - own).norm() == pytest.approx(0.5)
    else:
        assert (new == 0).all() if rule == "zero" else ((new >= 0) & (new <= 0.5)).all()


def test_members_take_turns() -> None:
    features = torch.ones(3, 4, 2, 2)
    seen = [of_its_member(features, 1, offset)[:, :, 0, 0].tolist() for offset in (0, 1)]
    first, second = [1, 1, 0, 0], [0, 0, 1, 1]
    assert seen == [[first, second, first], [second, first, second]]


# Two members in one network are two networks.


class Residual(Plain):
    """A convolutional network with BatchNorm, a shortcut and a flattened tail."""

    def build(self, width: int = 8) -> None:
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(2 * width)
        self.body = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, 2 * width, 1)
        self.hidden = nn.Linear(2 * width * 4, width)
        self.head = nn.Linear(width, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        first = self.norm1(self.stem(inputs.unflatten(1, (1, 4, 4)))).relu()
        second = (self.norm2(self.body(first)) + self.shortcut(first)).relu()
        return self.head(self.hidden(F.avg_pool2d(second, 2).flatten(1)).relu())


LAYERS = ("stem", "norm1", "body", "norm2", "shortcut", "hidden")


def halves(module: Residual) -> list[Residual]:
    """The two members of a block-diagonal network as networks of their own."""
    members = []
    for member in (0, 1):
        half = Residual()
        half.build(width=4)
        for name, tensor in half.state_dict().items():
            whole = module.state_dict()[name]
            for dim, (small, large) in enumerate(zip(tensor.shape, whole.shape, strict=True)):
                whole = whole if small == large else whole.narrow(dim, member * small, small)
            tensor.copy_(whole)
        members.append(half.train(module.training))
    return members


def outputs(module: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What every layer computes."""
    seen: dict[str, Tensor] = {}
    handles = [
        getattr(module, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out})) for name in LAYERS
    ]
    seen["output"] = module(inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_every_layer_of_the_network_is_two_members_side_by_side() -> None:
    run = grow([MixtureGrowth(at="step:100")], style=Residual)
    module, inputs = run.module.double().eval(), torch.randn(6, FEATURES).double()
    whole, parts = outputs(module, inputs), [outputs(half.double(), inputs) for half in halves(module)]
    for name in LAYERS:
        assert torch.allclose(whole[name], torch.cat([part[name] for part in parts], 1), rtol=0, atol=1e-13), name
    assert torch.allclose(whole["output"], parts[0]["output"] + parts[1]["output"], rtol=0, atol=1e-13)


def test_members_are_trained_as_two_networks_on_their_own_losses() -> None:
    """Four steps of one network of two members, against two networks of half the width that never meet."""
    torch.manual_seed(0)
    module = Residual("sgd")
    begin = copy.deepcopy(module)
    grow([method := MixtureGrowth(at="step:100")], module=module, max_epochs=1)
    method.attach(begin)
    method._split(method._maps(begin))
    mixtures = {mapped.name: (mapped.stored.data.clone(), entry.coefficients.data) for mapped, entry in method._maps(begin)}
    for member, (alone, inside) in enumerate(zip(halves(bake(begin)), halves(module), strict=True)):
        weights = train_alone(alone, member, mixtures)
        for name, tensor in inside.state_dict().items():
            assert torch.allclose(tensor, weights.get(name, alone.state_dict()[name]), atol=1e-6), (member, name)


def train_alone(net: Residual, member: int, mixtures: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Train one member by stochastic gradient descent on the samples that are its own; return its weights."""
    leaves: dict[str, list[Tensor]] = {name: [parameter] for name, parameter in net.named_parameters()}
    for name, (stored, shares) in mixtures.items():
        rows, columns = stored.shape[0] // 2, stored.shape[1] // 2
        own = stored[member * rows : (member + 1) * rows]
        leaves[name] = [nn.Parameter(part.clone()) for part in (own[:, :columns], own[:, columns:], shares[member, member])]

    def weights() -> dict[str, Tensor]:
        return {
            name: parts[0] if len(parts) == 1 else parts[2][0] * parts[0] + parts[2][1] * parts[1]
            for name, parts in leaves.items()
        }

    for step, (inputs, labels) in enumerate(loader()):
        mine = (torch.arange(len(labels)) + step) % 2 == member
        losses = F.cross_entropy(torch.func.functional_call(net, weights(), (inputs,)), labels, reduction="none")
        parameters = [part for parts in leaves.values() for part in parts]
        gradients = torch.autograd.grad((losses * mine).sum() / len(labels), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data -= net.lr * gradient
    return {name: weight.detach() for name, weight in weights().items()}


# The fusion.


def fused(rule: str, **arguments: Any) -> tuple[Residual, Residual]:
    """The network just before and just after its fusion, baked, after eight steps."""
    before = grow([MixtureGrowth(at="step:100")], style=Residual, max_epochs=2).module
    after = grow([MixtureGrowth(at="step:8", coefficients=rule, **arguments)], style=Residual, max_epochs=2).module
    return before, after


def test_members_meet_nowhere_before_the_fusion() -> None:
    style = type("Decayed", (Residual,), {"make_optimizer": lambda self, p: torch.optim.AdamW(p, 0.02, weight_decay=0.1)})
    module = grow([MixtureGrowth(at="step:100")], style=style).module
    for name in ("body", "shortcut", "hidden"):
        weight = getattr(module, name).weight
        rows, columns = weight.shape[0] // 2, weight.shape[1] // 2
        assert (weight[:rows, columns:] == 0).all()
        assert (weight[rows:, :columns] == 0).all()


def test_zero_coefficients_leave_the_network_what_it_was() -> None:
    before, after = fused("zero")
    assert difference(values(before), values(after)) is None


@pytest.mark.parametrize("rule", ["orthogonal", "copy", "random"])
def test_the_fusion_changes_only_blocks_off_the_diagonal(rule: str) -> None:
    before, after = (values(module) for module in fused(rule))
    for name, tensor in before.items():
        if name in ("body.weight", "shortcut.weight", "hidden.weight"):
            rows, columns = tensor.shape[0] // 2, tensor.shape[1] // 2
            assert torch.equal(tensor[:rows, :columns], after[name][:rows, :columns])
            assert torch.equal(tensor[rows:, columns:], after[name][rows:, columns:])
            assert (after[name][:rows, columns:] != 0).all()
        else:
            assert torch.equal(tensor, after[name]), name


def test_copied_coefficients_repeat_the_members() -> None:
    weight = fused("copy", noise=0.0)[1].hidden.weight
    rows, columns = weight.shape[0] // 2, weight.shape[1] // 2
    assert torch.equal(weight[:rows, :columns], weight[:rows, columns:])
    assert torch.equal(weight[rows:, :columns], weight[rows:, columns:])


def test_coefficients_are_not_decayed() -> None:
    class Decayed(Residual):
        def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, 0.02, weight_decay=0.1)

    run = grow([MixtureGrowth(at="step:4")], style=Decayed)
    sizes = {group["weight_decay"]: len(group["params"]) for group in run.trainer.optimizers[0].param_groups}
    assert sizes == {0.1: len(list(Residual().parameters())), 0.0: 3}


@pytest.mark.parametrize("at", ["step:6", "tokens:80", "plateau"])
@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "ema"])
def test_resumes(at: str, averaged: bool, tmp_path: Path) -> None:
    class Tokens(Residual):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.base_loss(batch) * 0 + 1)

    def run(**more: Any) -> Any:
        before = [EMAWeightAveraging(decay=0.5)] if averaged else []
        return grow([MixtureGrowth(at=at, patience=1, lr="rewarm:2")], style=Tokens, before=before, **more)

    whole = run(after=[every_epoch(tmp_path)])
    assert whole.methods[0].state()["changed_at"] is not None
    for epoch in range(2):
        resumed = run(seed=epoch + 9, resume=tmp_path / f"epoch={epoch}.ckpt")
        assert_same(whole, resumed, f"uninterrupted against resumed after epoch {epoch}")


def test_masks_lie_over_mixtures() -> None:
    run = grow([MixtureGrowth(at="step:4"), NMSparsity("2:4", targets=["hidden"], exclude=())], style=Residual)
    assert (run.module.hidden.weight == 0).float().mean() == 0.5


def test_members_stay_members_in_the_next_fit() -> None:
    first = grow([MixtureGrowth(at="step:100")], style=Residual, max_epochs=1)
    again = grow([method := MixtureGrowth(at="step:2")], module=first.module, max_epochs=1)
    assert method.state()["changed_at"] == 2
    third = grow([method := MixtureGrowth(at="step:2")], module=again.module, max_epochs=1)
    assert method.state()["changed_at"] == 0, "what was fused by an earlier fit is not split again"
    assert (third.module.hidden.weight != 0).all()


# What is refused.


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)], r"1 \(LayerNorm\) normalises both halves"),
        ([nn.Linear(4, 8), nn.GroupNorm(1, 8), nn.Linear(8, 8), nn.Linear(8, 3)], r"1 \(GroupNorm\) has an odd number of g"),
        ([nn.Linear(4, 7), nn.Linear(7, 8), nn.Linear(8, 3)], r"0 \(Linear\) has an odd number of outputs, 7"),
        ([nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 8), nn.Linear(8, 3)], r"1 \(PReLU\) has parameters that may belong"),
        ([nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Linear(8, 3)], r"1 \(Conv2d\) has groups of several"),
        ([nn.Conv2d(1, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Linear(8, 3)], r"1 \(ConvTranspose2d\) is a transposed"),
        ([nn.Linear(4, 8), nn.Linear(8, 3)], "no layer between its first and its last"),
    ],
)
def test_networks_that_are_refused(layers: list[nn.Module], reason: str) -> None:
    with pytest.raises(MisconfigurationException, match=reason):
        inner_layers(nn.Sequential(*layers))


@pytest.mark.parametrize("kind", ["concatenated", "shuffled", "apart"])
def test_members_that_meet_are_refused_at_the_first_step(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.mix = nn.Linear(16 if kind == "concatenated" else 8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            x = self.stem(inputs).relu()
            x = torch.cat([self.a(x), self.b(x)], -1) if kind == "concatenated" else self.a(x) + self.b(x)
            if kind == "shuffled":
                x = x.reshape(len(x), 2, 4).transpose(1, 2).reshape(len(x), 8)
            return self.head(self.mix(x.relu()).relu())

    class Style(Plain):
        def build(self) -> None:
            self.net = Net()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

    def run() -> None:
        grow([MixtureGrowth(at="step:2", network="net")], style=Style)

    if kind == "apart":
        run()
        return
    with pytest.raises(MisconfigurationException, match=r"not two members side by side.*depends on the other half of net"):
        run()


def test_layers_that_fit() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Linear(4, 5)]
    assert list(inner_layers(nn.Sequential(*layers))) == ["3"]
    branches = [nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(8, 1)]
    assert list(inner_layers(nn.Sequential(*branches), stem=["0", "1"], head=["3", "4"])) == ["2"]


@pytest.mark.parametrize("arguments", [{"coefficients": "none"}, {"lr": "restart"}, {"at": "soon"}])
def test_arguments_that_are_refused(arguments: Any) -> None:
    with pytest.raises(MisconfigurationException):
        MixtureGrowth(**arguments)


def test_methods_that_do_not_go_with_it() -> None:
    with pytest.raises(MisconfigurationException, match="both put a weight map on"):
        grow([MixtureGrowth(), WeightCompander()], style=Residual)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(FEATURES, FEATURES)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.fc(inputs).relu()

    class Stack(Plain):
        def build(self) -> None:
            self.blocks = nn.Sequential(*(Flat() for _ in range(4)))
            self.head = nn.Linear(FEATURES, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.blocks(inputs))

    with pytest.raises(MisconfigurationException, match="which member the new layers of stage_sharing would be"):
        grow([MixtureGrowth(), StageSharing(2, at="step:2", blocks="blocks")], style=Stack)


def test_members_begin_as_the_blocks_on_the_diagonal_grown_by_the_root_of_two() -> None:
    """Half the inputs at weights larger by the root of two: the variance of what a layer gives stays."""

    class First(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.before = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 0:
                self.weights = {mapped.name: mapped.baked().clone() for mapped in mapped_tensors(pl_module)}

    first = First()
    grow([MixtureGrowth(at="step:100")], style=Residual, before=[first])
    assert first.weights
    for name, now in first.weights.items():
        before, (rows, columns) = first.before[name], (size // 2 for size in now.shape[:2])
        for own in ((slice(rows), slice(columns)), (slice(rows, None), slice(columns, None))):
            torch.testing.assert_close(now[own], before[own] * 2**0.5)
        assert now[:rows, columns:].abs().max() < 1e-6
        assert now[rows:, :columns].abs().max() < 1e-6
