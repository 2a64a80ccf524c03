"""One module, fitted again: with the same delta it goes on, with another one it begins from what the first has learnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lightning_peft
from lightning_peft import DoRA, LoRA, NMSparsity
from lightning_peft.testing.modules import trainer

BATCH = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - 1).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("other", [{"rank": 3}, {"rank": 2, "alpha": 6}])
@pytest.mark.parametrize("beside", [[], [NMSparsity]])
def test_another_delta_begins_from_what_the_first_one_learnt(other: dict[str, Any], beside: list[Any]) -> None:
    module = Module()
    companions = [make("2:4", exclude=()) for make in beside]
    trainer(callbacks=[LoRA(2, exclude=None), *companions], max_epochs=20).fit(module, BATCH[None])  # type: ignore[arg-type]
    reached = float((module.net(BATCH) - 1).square().mean().detach())
    module.losses.clear()
    companions = [make("2:4", exclude=()) for make in beside]
    trainer(callbacks=[LoRA(exclude=None, **other), *companions], max_epochs=2).fit(module, BATCH[None])  # type: ignore[arg-type]
    if not beside or other["rank"] == 3:
        assert module.losses[0] == pytest.approx(reached, rel=1e-4)


def test_a_fit_that_failed_leaves_nothing_that_another_rank_trips_over() -> None:
    class Fails(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 0 and self.current_epoch == 1:
                raise KeyError("planned")
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(KeyError, match="planned"):
        trainer(callbacks=[LoRA(2, exclude=None)], max_epochs=3).fit(module, BATCH[None])  # type: ignore[arg-type]
    trainer(callbacks=[LoRA(3, exclude=None)], max_epochs=1).fit(module, BATCH[None])  # type: ignore[arg-type]


def test_an_adapter_of_another_method_is_not_trained_on_under_its_name() -> None:
    module = Module()
    trainer(callbacks=[LoRA(2, exclude=None, keep=True)], max_epochs=1).fit(module, BATCH[None])  # type: ignore[arg-type]
    before = module.net(BATCH)
    other = DoRA(2, exclude=None, keep=True, name="lora")
    with pytest.raises(MisconfigurationException, match=r"LoRA\(name='lora'\).*bake\(module\)"):
        trainer(callbacks=[other], max_epochs=1).fit(module, BATCH[None])  # type: ignore[arg-type]
    assert torch.equal(module.net(BATCH), before)
    lightning_peft.bake(module)
    trainer(callbacks=[other], max_epochs=1).fit(module, BATCH[None])  # type: ignore[arg-type]


def test_the_plan_says_which_rank_goes_on() -> None:
    module = Module()
    trainer(callbacks=[LoRA(2, exclude=None, keep=True)], max_epochs=1).fit(module, BATCH[None])  # type: ignore[arg-type]
    assert "those that are on the module go on with rank 2" in str(lightning_peft.plan(module, [LoRA(4, exclude=None)]))
    assert "go on" not in str(lightning_peft.plan(module, [LoRA(2, exclude=None)]))
