"""Penalties of methods reach the optimizer once a step, whatever scales, splits or repeats the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_peft import MaskedPruning, Method, NMSparsity, WeightCompander
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit, seed_all
from lightning_peft.weights.maps import mapped_tensors

STRENGTH = 0.01


class Look(Callback):
    """Notes stored value and weight of the second layer before some step, and the gradient that the step used."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.gradient: Tensor | None = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            layer = pl_module.model[2]
            self.stored = layer._parameters["weight"].detach().double().clone()
            self.weight = layer.weight.detach().double().clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step + 1 and self.gradient is None:
            # One that unscales by itself leaves it unscaled.
            self.gradient = pl_module.model[2]._parameters["weight"].grad.double()


class Twice(Plain):
    """Calls its network twice in a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(nn.functional.cross_entropy(self.logits(batch[0]), batch[1]) for _ in range(2)) / 2  # type: ignore[return-value]


class Decayed(Plain):
    fused = False
    decay = 0.1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=self.decay, fused=self.fused)


class Fused(Decayed):
    fused = True


def scaler() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


SETTINGS: dict[str, tuple[type[Plain], Callable[[], dict[str, Any]]]] = {
    "plain": (Decayed, dict),
    "accumulated": (Decayed, lambda: {"accumulate_grad_batches": 4}),
    "called twice": (Twice, dict),
    "gradient scaler": (Decayed, scaler),
    "gradient scaler, unscaled by the optimizer": (Fused, scaler),
}


def looked(method: Method, setting: str, step: int = 0, **options: Any) -> Look:
    style, settings = SETTINGS[setting]
    seed_all(0)
    look = Look(step)
    fit([method], after=[look], module=style("sgd"), max_epochs=4, **settings(), **options)
    assert look.gradient is not None
    return look


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("recipe", [{"refresh": 1}, {"refresh": 3}], ids=str)
def test_sr_ste_pulls_once_a_step(setting: str, recipe: dict[str, int]) -> None:
    free, pulled = (
        looked(NMSparsity("2:4", recipe="sr-ste", sr_lambda=strength, exclude=(), **recipe), setting)
        for strength in (0.0, STRENGTH)
    )
    pruned = free.weight == 0
    assert pruned.double().mean() == 0.5
    added = pulled.gradient - free.gradient
    torch.testing.assert_close(added, torch.where(pruned, STRENGTH * free.stored, 0.0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_pruned_weights_decay_once_a_step(setting: str) -> None:
    def pruning(strength: float) -> MaskedPruning:
        rule: Any = {"rule": "decay", "strength": strength, "shape": "constant", "every": 100, "scope": "layer"}
        return MaskedPruning(0.5, exclude=(), end=4, **rule)

    free, pulled = looked(pruning(1e-12), setting, step=1), looked(pruning(0.5), setting, step=1)
    added = pulled.gradient - free.gradient
    assert (added != 0).double().mean() >= 0.5
    largest = free.stored.flatten().abs().topk(added.numel() // 2).indices
    assert added.flatten()[largest].abs().max() <= 1e-6, "kept weights are left alone"
    ratio = (added / free.stored).flatten()[free.stored.flatten().abs().argsort()[: added.numel() // 2]]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5 / 4), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "called twice"])
def test_fixed_scales_decay_weights_once_a_step(setting: str) -> None:
    look = looked(WeightCompander(preset="resnet18/cifar10"), setting)
    style = SETTINGS[setting][0]

    class Undecayed(style):  # type: ignore[misc, valid-type]
        decay = 0.0

    SETTINGS["undecayed"] = (Undecayed, SETTINGS[setting][1])
    free = looked(WeightCompander(preset="resnet18/cifar10"), "undecayed")
    del SETTINGS["undecayed"]
    # What the optimizer adds to the gradient by itself, 0.1 v, is part of the decay of the weight.
    slope = (1.0 / 0.6) / (1 + (look.stored / 0.6).square())
    expected = 0.1 * look.weight * slope - 0.1 * look.stored
    torch.testing.assert_close(look.gradient - free.gradient, expected, rtol=1e-3, atol=1e-6)


def test_sr_ste_pulls_through_the_maps_below_and_their_own_parameters() -> None:
    def gradients(strength: float) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        class Read(Callback):
            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                if not found:
                    for mapped in mapped_tensors(pl_module):
                        compander = mapped.maps[0]
                        found[mapped.name] = mapped.stored.grad.double()
                        found[f"{mapped.name} a"] = compander.a.grad.squeeze(0)
                        found[f"{mapped.name} b"] = compander.b.grad.squeeze(0)
                        found[f"{mapped.name} v"] = mapped.stored.detach().double()

        seed_all(0)
        pulling = NMSparsity("2:4", recipe="sr-ste", sr_lambda=strength, exclude=())
        fit([pulling, WeightCompander()], after=[Read()], module=Plain("sgd"), max_epochs=1)
        return found

    free, pulled = gradients(0.0), gradients(0.5)
    for name in ("model.0.weight", "model.2.weight"):
        v, a, b = free[f"{name} v"].requires_grad_(), *torch.tensor([0.5, 1.0]).double().requires_grad_().unbind()
        weight = a * torch.atan(v / b)
        kept = torch.zeros_like(v).view(-1, 4).scatter(1, weight.detach().abs().view(-1, 4).topk(2).indices, 1.0).view_as(v)
        penalty = 0.5 / 2 * ((1 - kept) * weight).square().sum()
        for key, expected in zip(("", " a", " b"), torch.autograd.grad(penalty, (v, a, b)), strict=True):
            added = pulled[f"{name}{key}"].double() - free[f"{name}{key}"].double()
            torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-6)
