"""LoRA-GGPO: how far weights are moved, when, and what is trained at them."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lora_by_hand import answers, thin, train
from official_values import values_of
from torch import Tensor
from torch.nn import functional as F

from lightning_peft import LoRA, LoRAGGPO
from lightning_peft.deltas.layout import Layout
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft_plugins.deltas._lora_ggpo.perturbed_form import PerturbedForm

WHOLE: dict[str, Any] = {"exclude": None, "checkpoint": "full"}


def by_the_port(task: Task) -> list[float]:
    layers = thin(task, "lora_ggpo", 2)
    spreads: list[Tensor] = []

    def step(number: int, inputs: Tensor, labels: Tensor) -> Tensor:
        weights = [each.layer.weight + 2 * each.product for each in layers]
        for place, spread in enumerate(spreads):
            seed = torch.Generator().manual_seed(zlib.crc32(f"5/{number}/{layers[place].name}".encode()))
            weights[place] = weights[place] + spread[:, None] * torch.randn(weights[place].shape, generator=seed)
        loss = F.cross_entropy(answers(inputs, layers, weights), labels)
        loss.backward()
        spreads.clear()
        with torch.no_grad():
            for each in layers:
                beside = torch.cat([each.layer.weight, 2 * each.product], 1).norm(dim=1)
                assert each.up.grad is not None
                assert each.down.grad is not None
                gradient = 2 * (each.up @ each.down.grad + each.up.grad @ each.down)
                spreads.append((0.2 * beside + 0.5 * gradient.norm(dim=1) ** 2) / len(beside) ** 0.5)
        return loss

    losses = train(task, layers, step)
    with torch.no_grad():
        for each in layers:  # the scale is two
            each.layer.weight += each.product
    return losses


class TestLoRAGGPO(MethodTester):
    methods = [
        lambda: LoRAGGPO(2, 4, 0.2, 0.5, 5, **WHOLE),
        lambda: LoRAGGPO(2, sigma=0.05, targets="all-weights", tune=("bias",), **WHOLE),
    ]
    references = [Reference(by_the_port)]


def test_the_spread_is_that_of_the_port() -> None:
    """Rows of one length: it takes their mean for each."""
    recorded = values_of("lora_rules_official")["lora_ggpo"]
    names = ("weight", "down", "up", "grad_down", "grad_up", "spread")
    weight, down, up, grad_down, grad_up, spread = (torch.tensor(recorded[key], dtype=torch.float64) for key in names)
    form = PerturbedForm(Layout(weight.shape), 2).double()
    form.set_factors(down, up)
    form.down.grad, form.up.grad = grad_down, grad_up
    method = LoRAGGPO(2, sigma=recorded["sigma"], beta=recorded["beta"])
    found = method._spread(form, weight.norm(dim=1), 1.0)
    torch.testing.assert_close(found, spread, atol=1e-12, rtol=1e-12)


def test_what_is_added_has_that_spread_and_no_mean() -> None:
    form = PerturbedForm(Layout(torch.Size([3, 20000])), 1)
    form.spread, form.seed = torch.tensor([0.0, 1.0, 4.0]), torch.tensor(3)
    drawn = form.drawn()
    assert drawn is not None
    torch.testing.assert_close(drawn.std(dim=1), form.spread, atol=0.05, rtol=0)
    assert (drawn.mean(dim=1).abs() <= 0.03 * form.spread).all()


@pytest.mark.parametrize("side", ["beside", "weight"])
def test_without_a_spread_it_is_lora_bit_for_bit(side: str) -> None:
    where = {"name": "same", **(WHOLE if side == "beside" else {**WHOLE, "targets": "all-weights"})}
    moved, plain = (fit([make]).module.state_dict() for make in (LoRAGGPO(2, sigma=0, beta=0, **where), LoRA(2, **where)))
    assert all(torch.equal(moved[name], value) for name, value in plain.items())


class Watches(Callback):
    """Notes whether weights are moved, and the spreads after every step."""

    def __init__(self, method: LoRAGGPO) -> None:
        self.method, self.moved, self.spreads = method, list[bool](), list[Tensor]()

    def look(self, module: LightningModule) -> None:
        self.moved.append(any(form.spread is not None for _, form in self.method.forms(module)))

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.look(pl_module)
        self.spreads += list(self.method.spreads.values())

    def on_validation_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.look(pl_module)


def test_only_training_steps_see_moved_weights() -> None:
    """Within accumulated batches too: a validation comes after every batch here, and a step after every second."""
    method = LoRAGGPO(2, **WHOLE)
    watches = Watches(method)
    fit([method], after=[watches], max_epochs=2, accumulate_grad_batches=2, val_check_interval=1)
    assert len(watches.moved) > 8
    assert not any(watches.moved)


class Fused(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02, fused=True)


def under_a_scaler(scale: float, style: type[Plain] = Plain) -> list[Tensor]:
    method = LoRAGGPO(2, **WHOLE)
    watches = Watches(method)
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))  # type: ignore[attr-defined]
    fit([method], after=[watches], style=style, plugins=[scaler], limit_train_batches=2)
    return watches.spreads


@pytest.mark.parametrize("style", [Plain, Fused])
def test_a_gradient_scaler_has_no_say(style: type[Plain]) -> None:
    """An optimizer with ``fused=True`` unscales by itself, after the gradients are looked at."""
    for one, other in zip(under_a_scaler(1.0, style), under_a_scaler(1024.0, style), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0.02)


def test_a_step_that_is_skipped_leaves_no_trace() -> None:
    spreads = under_a_scaler(2.0**60)
    assert spreads
    assert all(spread.isfinite().all() for spread in spreads)


def test_weights_below_zero_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="must not be negative"):
        LoRAGGPO(sigma=-0.1)
