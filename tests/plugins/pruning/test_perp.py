"""PERP: what is trained and what is not, zeros that stay, and the factors' algebra."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn

import lightning_peft
from lightning_peft import PERP, LayerGrowth, MagnitudePruning, MaskedPruning, NMSparsity, Wanda
from lightning_peft.functional import is_nm
from lightning_peft.testing import MethodTester
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import BatchNorm, Conv, HuggingFace, Plain, deepened, loader
from lightning_peft.testing.runs import assert_clean, assert_same, fit
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft_plugins.pruning.functional.perp import MaskLoRAMap, ScaleLoRAMap, mask_lora

EVERYTHING: Any = ()


class TestPERP(MethodTester):
    methods = [
        PERP,
        lambda: PERP(("bias", "norm"), lora="scale", rank=2, exclude=EVERYTHING),
        lambda: PERP(lora=None),
    ]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.ndim > 1}


def sparse(style: type[Plain] = Plain, share: float = 0.5) -> Plain:
    """A module that was pruned before, all but its head."""
    torch.manual_seed(0)
    module = style()
    with torch.no_grad():
        for weight in list(weights_of(module))[:-1]:
            weight.mul_(torch.rand_like(weight) >= share)
    return module


def weights_of(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.ndim > 1]


@pytest.mark.parametrize("lora", ["mask", "scale"])
@pytest.mark.parametrize("style", [Plain, Conv, HuggingFace])
def test_the_zeros_of_a_sparse_network_stay_and_the_rest_is_trained(style: type[Plain], lora: Any) -> None:
    module = sparse(style)
    before = weights(module)
    run = fit([PERP(lora=lora, rank=4, exclude=["head"])], module=module, max_epochs=2)
    after = weights(run.module)
    head = list(before)[-1]
    for name, weight in before.items():
        assert not torch.equal(weight, after[name]), f"{name} was not trained"
        if name != head:
            assert torch.equal(weight == 0, after[name] == 0), f"{name} has other zeros"


@pytest.mark.parametrize("lora", ["mask", "scale"])
@pytest.mark.parametrize("data", [False, True])
def test_prune_and_retrain_in_one_fit(data: bool, lora: Any, tmp_path: Path) -> None:
    """Masks are chosen once, at the start or by Wanda after two steps, and what is left moves by the low-rank map."""

    def methods() -> list[Any]:
        prune = Wanda(0.5, exclude=EVERYTHING, every=2) if data else MagnitudePruning(0.5, end=None, exclude=EVERYTHING)
        return [prune, PERP(lora=lora, rank=4, exclude=EVERYTHING)]

    run = fit(methods(), after=[every_epoch(tmp_path)], max_epochs=3)
    after = weights(run.module)
    assert sum(int((p == 0).sum()) for p in after.values()) == sum(p.numel() for p in after.values()) // 2
    if not data:
        alone = weights(fit(methods()[:1]).module)
        assert all(torch.equal(p == 0, alone[name] == 0) for name, p in after.items())
    baked = lightning_peft.load_from_checkpoint(Plain, tmp_path / "epoch=2.ckpt")
    assert all(torch.equal(p, after[name]) for name, p in weights(baked).items())
    resumed = fit(methods(), resume=tmp_path / "epoch=0.ckpt", seed=3, max_epochs=3)
    assert_same(run, resumed, "uninterrupted against resumed")


@pytest.mark.parametrize("recipe", ["one-shot", "ste"])
def test_the_weights_of_a_pattern_are_retrained(recipe: Any) -> None:
    run = fit([NMSparsity("2:4", recipe, exclude=EVERYTHING), PERP(exclude=EVERYTHING)], max_epochs=2)
    assert all(is_nm(p, 2, 4) for p in weights(run.module).values())


class Watch(Callback):
    """Which parameters can be trained, and which an optimizer has moved."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.trained = {name for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.moved = {names[id(p)] for p, state in trainer.optimizers[0].state.items() if state}


def test_only_what_is_named_is_trained() -> None:
    def trained(style: type[Plain] = BatchNorm, **arguments: Any) -> set[str]:
        watch = Watch()
        run = fit([PERP(**arguments)], after=[watch], style=style)
        assert watch.trained == watch.moved
        assert_clean(run.module, "PERP")
        return watch.trained

    # 0 Linear, 1 BatchNorm, 2 ReLU, 3 Linear, 4 ReLU, 5 the head
    assert trained(tune="bias", lora=None) == {"model.0.bias", "model.1.bias", "model.3.bias", "model.5.bias"}
    assert trained(tune=("norm",), lora=None) == {"model.1.weight", "model.1.bias"}
    assert trained(tune=("head",), lora=None) == {"model.5.weight", "model.5.bias"}
    maps = {"model.3.parametrizations.weight.0.a", "model.3.parametrizations.weight.0.b"}
    assert trained(tune=()) == maps
    # A head with a map of its own is trained through it.
    head = {"model.5.parametrizations.weight.0.a", "model.5.parametrizations.weight.0.b"}
    assert trained(tune=("head",), exclude=["first"]) == maps | head | {"model.5.bias"}


def test_what_was_frozen_before_stays_frozen() -> None:
    class Partly(Plain):
        def build(self) -> None:
            super().build()
            self.model[2].bias.requires_grad_(False)

    module = fit([PERP()], style=Partly).module
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"model.2.bias"}
    torch.manual_seed(0)
    assert torch.equal(module.model[2].bias, Partly().model[2].bias)


def test_an_optimizer_may_ask_what_is_trainable(tmp_path: Path) -> None:
    class Filtered(Plain):
        def configure_optimizers(self) -> Any:
            return self.make_optimizer([p for p in self.parameters() if p.requires_grad])

    filtered = fit([PERP()], style=Filtered, after=[every_epoch(tmp_path)], max_epochs=2)
    everything = fit([PERP()], max_epochs=2)
    assert filtered.losses == everything.losses
    resumed = fit([PERP()], style=Filtered, resume=tmp_path / "epoch=0.ckpt", seed=4, max_epochs=2)
    assert_same(filtered, resumed, "uninterrupted against resumed")


def test_frozen_weights_do_not_decay() -> None:
    class Decaying(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.5)

    torch.manual_seed(0)
    before = Decaying().model[2].weight
    assert torch.equal(before, fit([PERP(lora=None)], style=Decaying, max_epochs=2).module.model[2].weight)


@given(st.integers(1, 5), st.sampled_from([(3, 4), (2, 3, 3, 3), (4, 1, 5)]), st.integers(0, 1000))
def test_maps_start_as_identities_and_never_leave_the_mask(rank: int, shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.5)
    mask, scale = MaskLoRAMap(list(shape), rank, 32.0), ScaleLoRAMap(list(shape), rank, 1.0)
    assert torch.equal(mask(weight), weight)
    torch.testing.assert_close(scale(weight), weight)
    with torch.no_grad():
        for parameter in [*mask.parameters(), *scale.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    assert not mask(weight)[weight == 0].any()
    assert not scale(weight)[weight == 0].any()
    delta = (mask(weight) - weight).flatten(1)
    product = (mask.b @ mask.a).view_as(delta) * 32.0 / rank
    torch.testing.assert_close(delta, product * (weight.flatten(1) != 0))
    torch.testing.assert_close(scale(weight).flatten(1), weight.flatten(1) * (scale.b @ scale.a).view_as(delta))


def test_factors_of_scale_lora_stay_of_rank_one() -> None:
    """The official start gives every component the same gradient; the card says so."""
    run = fit([PERP((), lora="scale", rank=4, exclude=EVERYTHING)], after=[Keep()], max_epochs=2)
    for factor in run.trainer.callbacks[1].factors:  # type: ignore[attr-defined]
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))


class Keep(Callback):
    """Factors of every map at the end, components first."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        maps = [entry for mapped in mapped_tensors(pl_module) for entry in mapped.maps]
        self.factors = [factor.detach().clone() for entry in maps for factor in (entry.a, entry.b.t())]  # type: ignore[union-attr,operator]


def test_the_training_of_a_masked_lora_by_hand() -> None:
    """Loss by loss what a module with the factors written into it gives."""

    class ByHand(nn.Module):
        def __init__(self, layer: nn.Linear, a: Tensor) -> None:
            super().__init__()
            self.weight, self.bias = layer.weight.detach().clone(), layer.bias
            self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(torch.zeros(len(self.weight), len(a)))

        def forward(self, inputs: Tensor) -> Tensor:
            return nn.functional.linear(inputs, self.weight + 2.0 * (self.weight != 0) * (self.b @ self.a), self.bias)

    mine, theirs = sparse(), sparse()
    start: list[Tensor] = []

    class First(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            start.extend(entry.a.detach().clone() for m in mapped_tensors(pl_module) for entry in m.maps)  # type: ignore[union-attr]

    run = fit([PERP(("bias",), rank=16, alpha=32)], module=mine, after=[First()], max_epochs=3)
    for layer in (theirs.model[0], theirs.model[4]):
        layer.weight.requires_grad_(False)
    theirs.model[2] = ByHand(theirs.model[2], start[0])
    reference = fit([], module=theirs, max_epochs=3)
    torch.testing.assert_close(run.losses, reference.losses)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tune": ("bias", "embedding")}, "choose one of bias, norm, head"),
        ({"lora": "prune"}, "choose one of mask, scale, None"),
        ({"tune": (), "lora": None}, "Nothing would be trained"),
        ({"rank": 0}, "at least 1"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        PERP(**arguments)


def test_what_cannot_be_retrained_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="names no trainable parameter"):
        fit([PERP("norm", lora=None)])

    class Chosen(Plain):
        def configure_optimizers(self) -> Any:
            return self.make_optimizer([p for n, p in self.named_parameters() if n.endswith(".b")])

    with pytest.raises(MisconfigurationException, match="but no optimizer has it"):
        fit([PERP()], style=Chosen)
    module = sparse()
    with torch.no_grad():
        module.model[4].weight[0, 0] = 0
    with pytest.raises(MisconfigurationException, match=r"model\.4 has zeros that would be trained"):
        fit([PERP()], module=module)
    assert all(p.requires_grad for p in module.parameters())
    fit([PERP(), MaskedPruning(0.5, exclude=EVERYTHING)], module=copy.deepcopy(module))
    with pytest.raises(MisconfigurationException, match="which layer_growth changes"):
        fit([PERP(), LayerGrowth(start=1, to=2, at="step:2")], style=deepened(Plain), data=loader())


def test_the_arithmetic_of_a_mask() -> None:
    weight = torch.tensor([[1.0, 0.0], [-2.0, 3.0]], requires_grad=True)
    product = torch.ones(2, 2, requires_grad=True)
    mask_lora(weight, product, 0.5).sum().backward()
    assert product.grad is not None
    assert product.grad.tolist() == [[0.5, 0.0], [0.5, 0.5]]
