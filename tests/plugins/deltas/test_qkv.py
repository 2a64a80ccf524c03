"""Deltas of queries and values alone, in layers that project to queries, keys and values at once."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lightning_peft
from lightning_peft import LoRA
from lightning_peft.testing.modules import trainer

BATCH = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Module(LightningModule):
    def __init__(self, net: type[nn.Module] = Attention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = net().double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.roll(1, 1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def gained(method: LoRA, net: type[nn.Module] = Attention, name: str = "net.qkv.weight") -> Tensor:
    module = Module(net)
    before = module.get_parameter(name).detach().clone()
    trainer(callbacks=[method], max_epochs=6).fit(module, BATCH)  # type: ignore[arg-type]
    return module.get_parameter(name).detach() - before


@pytest.mark.parametrize(("net", "name"), [(Attention, "net.qkv.weight"), (Whole, "net.attention.in_proj_weight")])
def test_keys_stay_and_each_third_has_its_own_rank(net: type[nn.Module], name: str) -> None:
    target = name.rpartition(".")[0]
    q, k, v = gained(LoRA(2, targets=[target], exclude=None, qkv="qv"), net, name).chunk(3)
    assert k.abs().max() == 0
    assert [int(torch.linalg.matrix_rank(part, atol=1e-9)) for part in (q, v)] == [2, 2]


def test_all_thirds_have_more_rank_than_one_product() -> None:
    whole, thirds = (gained(LoRA(2, targets=["net.qkv"], exclude=None, qkv=qkv)) for qkv in (None, "qkv"))
    assert [int(torch.linalg.matrix_rank(each, atol=1e-9)) for each in (whole, thirds)] == [2, 6]


def test_the_plan_counts_the_thirds() -> None:
    plan = str(lightning_peft.plan(Module(), [LoRA(2, targets=["net.qkv"], exclude=None, qkv="qv")]))
    assert f"{2 * 2 * (8 + 8)} parameters" in plan


def test_a_layer_without_thirds_is_refused_and_the_advice_works() -> None:
    with pytest.raises(MisconfigurationException, match=r"net\.out\.weight, \(8, 8\), has no thirds"):
        gained(LoRA(2, targets=["net.qkv", "net.out"], exclude=None, qkv="qv"))
    module = Module()
    both = [LoRA(2, targets=["net.qkv"], exclude=None, qkv="qv"), LoRA(2, targets=["net.out"], exclude=None, name="other")]
    first = module.net.out.weight.detach().clone()  # type: ignore[union-attr]
    trainer(callbacks=both).fit(module, BATCH)  # type: ignore[arg-type]
    assert not torch.equal(module.net.out.weight, first)  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", [{"qkv": "x"}, {"qkv": ""}, {"qkv": "qv", "init": "pissa"}])
def test_what_makes_no_sense_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(MisconfigurationException, match="qkv="):
        LoRA(2, **settings)  # type: ignore[arg-type]
