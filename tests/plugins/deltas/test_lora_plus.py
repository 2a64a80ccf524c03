"""LoRA+: the second factor learns faster, as with PEFT's optimizer, under schedulers and for both sides of a layer."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lightning_peft import DoRA, LoRA, NMSparsity
from lightning_peft.optim.optimizers import owner
from lightning_peft.testing.modules import Plain, loader
from lightning_peft.testing.runs import fit


def rates(method: Any, module: nn.Module, optimizer: Any) -> dict[str, list[float]]:
    """Learning rates of the parameters of every form, by name."""
    found: dict[str, list[float]] = {}
    for _, form in method.forms(module):
        for name, parameter in form.named_parameters():
            place = owner([optimizer], parameter)
            assert place is not None
            found.setdefault(name, []).append(optimizer.param_groups[place[1]]["lr"])
    return found


class Trained(Plain):
    """Gives the optimizer what is trained alone, and a scheduler to it."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}


def test_every_step_is_that_of_peft() -> None:
    method = LoRA(2, 3, lr_ratio=8, targets=["model.0", "model.2"], exclude=None, keep=True)
    module = Trained()
    start: dict[str, Any] = {}

    class Notes(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            start.update({name: form.down.detach().clone() for name, form in method.forms(pl_module)})

    torch.manual_seed(0)
    base = Trained()
    module.load_state_dict(base.state_dict())
    run = fit([method], module=module, after=[Notes()], max_epochs=3)

    wrapped: Any = peft.get_peft_model(base.model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"]))
    layers = {f"model.{place}.weight": wrapped.get_submodule(f"base_model.model.{place}") for place in (0, 2)}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data.copy_(start[name])
    optimizer = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=0.02, loraplus_lr_ratio=8)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    losses = []
    for _ in range(3):
        for inputs, labels in loader():
            loss = nn.functional.cross_entropy(wrapped(inputs), labels)
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    torch.testing.assert_close(run.losses, losses, atol=1e-5, rtol=1e-5)
    for name, form in method.forms(module):
        torch.testing.assert_close(form.up.detach(), layers[name].lora_B["default"].weight.detach(), atol=1e-5, rtol=1e-5)


class Looks(Callback):
    """Takes the rates down when the last step is over."""

    def __init__(self, method: Any) -> None:
        self.method, self.found = method, dict[str, list[float]]()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.found = rates(self.method, pl_module, trainer.optimizers[0])


@pytest.mark.parametrize("style", [Plain, Trained])
@pytest.mark.parametrize("masked", [False, True])
def test_the_second_factor_has_a_multiple_of_the_rate(style: type[Plain], masked: bool) -> None:
    method = DoRA(2, lr_ratio=4, exclude=None)
    looks = Looks(method)
    beside = [NMSparsity("2:4", targets=["model.0", "model.2", "model.4"], exclude=())] if masked else []
    fit([method, *beside], style=style, after=[looks])
    lr = 0.01 if style is Trained else 0.02  # the scheduler has halved it once
    assert set(looks.found["down"]) == set(looks.found["magnitude"]) == {lr}
    assert set(looks.found["up"]) == {4 * lr}


def test_an_adapter_that_stays_gets_the_rates_of_the_next_fit() -> None:
    module = Plain().train()
    fit([LoRA(2, lr_ratio=4, keep=True, exclude=None)], module=module)
    method = LoRA(2, keep=True, exclude=None)
    looks = Looks(method)
    fit([method], module=module, after=[looks])
    assert set(looks.found["up"]) == {0.02}


def test_a_ratio_that_stops_the_factor_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="factor on the learning rate of B"):
        LoRA(2, lr_ratio=0)
