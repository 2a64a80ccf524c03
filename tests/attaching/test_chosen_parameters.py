"""Optimizers made of the parameters of a part of the module, as most projects make them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import LoRA, WeightCompander
from lightning_peft.testing.modules import trainer

BATCHES = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


class Nested(LightningModule):
    def __init__(self, choose: Callable[[Any], Iterable[nn.Parameter]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict(
            {"body": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "head": nn.Linear(8, 2)}
        )
        self.choose, self.orders = choose, list[list[str]]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model["head"](self.model["body"](batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.orders.append([name for name, _ in self.named_parameters()])
        return torch.optim.SGD(self.choose(self), lr=0.1)


CHOICES: dict[str, Callable[[Any], Iterable[nn.Parameter]]] = {
    "the module": lambda module: [p for p in module.parameters() if p.requires_grad],
    "the model": lambda module: [p for p in module.model.parameters() if p.requires_grad],
    "the body": lambda module: [p for p in module.model["body"].parameters() if p.requires_grad],
    "all of the model": lambda module: module.model.parameters(),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("make", [lambda: LoRA(2, exclude=["head"]), lambda: WeightCompander(exclude=())])
def test_the_trained_parameters_of_a_part_are_those_of_the_module(name: str, make: Callable[[], Any]) -> None:
    trained = {}
    for chosen in ("the module", name):
        module = Nested(CHOICES[chosen])
        trainer(callbacks=[make()], max_epochs=2).fit(module, BATCHES)  # type: ignore[arg-type]
        trained[chosen] = module.state_dict()
        assert "named_modules" not in vars(module.model)
        assert "named_modules" not in vars(module.model["body"])
    if name != "the body" or isinstance(make(), LoRA):
        torch.testing.assert_close(dict(trained[name]), dict(trained["the module"]))


def test_the_order_of_all_parameters_is_the_same_while_optimizers_are_made() -> None:
    module = Nested(CHOICES["the model"])
    plain = [name for name, _ in module.named_parameters()]
    trainer(callbacks=[LoRA(2, exclude=["head"])]).fit(module, BATCHES)  # type: ignore[arg-type]
    assert module.orders[0][: len(plain)] == plain
    assert len(module.orders[0]) == len(plain) + 4
