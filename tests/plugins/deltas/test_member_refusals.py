"""What the members of the family refuse, and that their advice works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lightning_peft
from lightning_peft import SALT, SORSA, Bone, KaSA, LoLDU, LoRA, PiSSA, SoKA, SVFit
from lightning_peft.testing.modules import trainer

BATCH = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 6))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(method: Any, module: LightningModule | None = None) -> None:
    trainer(callbacks=[method]).fit(module or Module(), BATCH)  # type: ignore[arg-type]


EXCLUDING: dict[str, tuple[Callable[..., Any], str]] = {
    "Bone": (lambda **k: Bone(2, **k), "rank=2 does not divide both sides of net.0.weight"),
    "PHM": (lambda **k: lightning_peft.PHM(1, 2, **k), "terms=2 does not divide both sides of net.0.weight"),
    "KaSA": (lambda **k: KaSA(6, **k), "rank=6 would take all singular values of net.0.weight"),
    "SoKA": (lambda **k: SoKA(5, **k), "rank=5 is above the 4 Kronecker products that net.2.weight"),
}


@pytest.mark.parametrize("name", EXCLUDING)
def test_a_weight_that_does_not_fit_is_named_and_can_be_left_out(name: str) -> None:
    make, words = EXCLUDING[name]
    with pytest.raises(MisconfigurationException, match=re.escape(words)) as refusal:
        fit(make(exclude=None))
    assert "exclude=[" in str(refusal.value)
    if name in ("Bone", "PHM"):
        (named,) = re.findall(r"exclude=\[([^\]]*)\]", str(refusal.value))
        fit(make(exclude=[each.strip("'") for each in named.split(", ")]))
    elif name == "SoKA":
        fit(SoKA(int(re.findall(r"at most rank=(\d+)", str(refusal.value))[0]), exclude=None))
    else:
        fit(KaSA(5, exclude=None))


@pytest.mark.parametrize("rest", [0.0, 1e-8], ids=["exact", "to rounding"])
def test_a_pivot_of_zero_is_refused_and_a_smaller_rank_is_not(rest: float) -> None:
    module = Module()
    with torch.no_grad():
        module.net[2].weight.fill_(rest)  # type: ignore[union-attr, operator]
        module.net[2].weight[0, 0] = 1.0  # type: ignore[union-attr, index]
    with pytest.raises(MisconfigurationException, match=r"net\.2\.weight: .* a pivot of zero among its first 2"):
        fit(LoLDU(2, exclude=None), module)
    fit(LoLDU(1, exclude=None), module)
    fit(SVFit(2, exclude=None), module)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: SORSA(gamma=0.0), "PiSSA trains the same part without a penalty"),
    (lambda: SALT(share=1.0), "SVFit trains singular values alone"),
    (lambda: KaSA(beta=-1.0), "must not be negative"),
    (lambda: PiSSA(alpha=-2.0), "alpha=-2.0 must be positive"),
    (lambda: LoRA(init="pisa"), "Did you mean pissa"),
    (lambda: lightning_peft.NOLA(bases=0), "bases=0 must be positive"),
    (lambda: lightning_peft.EVA(looks=0), "looks=0 must be positive"),
    (lambda: lightning_peft.EVA(rho=0.5), "rho=0.5 must be at least 1"),
    (lambda: lightning_peft.CorDA(directions="middle"), "choose one of first, last"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_arguments_that_make_no_sense(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        make()
