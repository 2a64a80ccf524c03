"""Members that PEFT has too, trained beside it from one start: the same losses and merged weights."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

import lightning_peft
from lightning_peft.testing.modules import trainer

STEPS, SIZES = 5, [(12, 8), (8, 12), (12, 4)]
BATCHES = torch.randn(STEPS, 6, 12, generator=torch.Generator().manual_seed(1))
LAYERS = ["0", "2", "4"]


def network() -> nn.Module:
    torch.manual_seed(0)
    first, second, third = (nn.Linear(inputs, outputs) for inputs, outputs in SIZES)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)


def loss_of(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


class Tuned(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.losses = network(), list[float]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.model(batch))
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Begins(Callback):
    """Gives our forms the values that PEFT drew."""

    def __init__(self, method: Any, values: dict[str, dict[str, Tensor]]) -> None:
        self.method, self.values = method, values

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for name, form in self.method.forms(pl_module):
                for key, value in self.values[name].items():
                    assert getattr(form, key).shape == value.shape, (name, key)
                    getattr(form, key).copy_(value)


def none(layer: Any) -> dict[str, Tensor]:
    return {}


def kasa_values(layer: Any) -> dict[str, Tensor]:
    return {
        "down": layer.lora_A["default"].weight.detach().clone(),
        "up": layer.lora_B["default"].weight.detach().clone(),
        "values": layer.lora_diag["default"].detach().clone(),
    }


def randlora_values(layer: Any) -> dict[str, Tensor]:
    products, smaller = layer.randlora_gamma["default"].shape
    large = layer.randlora_B["default"][: max(layer.in_features, layer.out_features), :products]
    return {
        "small": layer.randlora_A["default"][:, :, :smaller].clone(),
        "large": large.flatten(1).clone(),
    }


CASES: dict[str, tuple[Any, Any, Any]] = {
    "pissa": (lambda: peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights="pissa"), lightning_peft.PiSSA(2, 3), none),
    "olora": (lambda: peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights="olora"), lightning_peft.OLoRA(2, 3), none),
    "miss": (lambda: peft.MissConfig(r=4), lightning_peft.MiSS(4), none),
    "miss with a rest": (lambda: peft.MissConfig(r=3), lightning_peft.MiSS(3), none),
    "bat": (lambda: peft.MissConfig(r=4, init_weights="bat"), lightning_peft.Bone(4), none),
    "kasa": (
        lambda: peft.LoraConfig(r=2, lora_alpha=3, kasa_config=peft.KasaConfig(beta=0.0, gamma=0.0)),
        lightning_peft.KaSA(2, 3, beta=0.0, gamma=0.0),
        kasa_values,
    ),
    "kasa with its penalties": (
        lambda: peft.LoraConfig(r=2, lora_alpha=3, kasa_config=peft.KasaConfig(beta=0.1, gamma=0.2)),
        lightning_peft.KaSA(2, 3, beta=0.1 * len(LAYERS), gamma=0.2 * len(LAYERS)),  # a sum there, the paper's mean here
        kasa_values,
    ),
    "randlora": (
        lambda: peft.RandLoraConfig(r=4, randlora_alpha=6),
        lightning_peft.RandLoRA(4, 6),
        randlora_values,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_merged_weights_are_those_of_peft(name: str) -> None:
    make, method, values = CASES[name]
    config = make()
    config.target_modules = set(LAYERS)
    wrapped = peft.get_peft_model(network(), config)
    layers = {f"model.{key}.weight": wrapped.get_submodule(f"base_model.model.{key}") for key in LAYERS}
    method.targets, method.exclude = ["model.0", "model.2", "model.4"], None
    begins = Begins(method, {key: values(layer) for key, layer in layers.items()})
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in BATCHES:
        optimizer.zero_grad()
        loss = loss_of(wrapped(batch))
        losses.append(float(loss.detach()))
        if "penalties" in name:
            loss = loss + wrapped.base_model._get_kasa_loss()
        loss.backward()
        optimizer.step()

    module = Tuned()
    trainer(callbacks=[method, begins]).fit(module, BATCHES)  # type: ignore[arg-type]
    torch.testing.assert_close(module.losses, losses, atol=1e-5, rtol=1e-5)
    merged, after = wrapped.merge_and_unload().state_dict(), module.model.state_dict()
    assert any((after[key] - value).abs().max() > 1e-3 for key, value in network().state_dict().items()), "nothing moved"
    for key, value in merged.items():
        torch.testing.assert_close(after[key], value, atol=2e-5, rtol=1e-5)
