"""PEGO: its terms beside the official code's, and the training in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lora_by_hand import answers, thin, train
from official_values import values_of
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft
from lightning_peft import PEGO
from lightning_peft.functional import pego_diversify, pego_preserve
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft_plugins.deltas._shared.frozen_weights import frozen_weights

WHOLE: dict[str, Any] = {"exclude": None, "checkpoint": "full"}


def by_the_paper(task: Task) -> list[float]:
    layers = thin(task, "pego", 3)
    frozen = [each.layer.weight.clone() for each in layers]

    def step(number: int, inputs: Tensor, labels: Tensor) -> Tensor:
        weights = [weight + each.product for weight, each in zip(frozen, layers, strict=True)]
        loss = F.cross_entropy(answers(inputs, layers, weights), labels)
        term = torch.zeros(())
        for weight, each in zip(frozen, layers, strict=True):
            members = [torch.outer(each.up[:, i], each.down[i]) for i in range(3)]
            term = term + sum((weight @ member.T).abs().sum() for member in members)
            term = term + sum((members[i] @ members[j].T).abs().sum() for i in range(3) for j in range(i))
        (loss + 0.01 * term).backward()
        return loss

    return train(task, layers, step)


class TestPEGO(MethodTester):
    methods = [
        lambda: PEGO(1, 3, 0.01, **WHOLE),
        lambda: PEGO(1, 2, 0.01, targets="all-weights", tune=("bias",), **WHOLE),
    ]
    references = [Reference(by_the_paper)]

    def test_compiled(self, lead: Any) -> None:
        pytest.skip("the part is LoRA's")


def test_terms_are_those_of_the_official_code() -> None:
    recorded, total = values_of("lora_rules_official")["pego"], torch.zeros((), dtype=torch.float64)
    for part in ("queries", "values"):
        weight, *factors = (torch.tensor(recorded[part][key], dtype=torch.float64) for key in ("weight", "down", "up"))
        down, up = (factor.requires_grad_() for factor in factors)
        term = pego_preserve(weight, down, up, recorded["members"]) + pego_diversify(down, up, recorded["members"])
        term.backward()
        for factor, key in ((down, "grad_down"), (up, "grad_up")):
            gradient = torch.tensor(recorded[part][key], dtype=torch.float64)
            torch.testing.assert_close(factor.grad, gradient, atol=1e-10, rtol=1e-10)
        total += term.detach()
    assert float(total) == pytest.approx(recorded["loss"], rel=1e-12)


def test_members_that_are_orthogonal_cost_nothing() -> None:
    eye = torch.eye(4)
    assert pego_preserve(torch.outer(eye[0], eye[0]), eye[1:3], eye[:, 1:3], 2) == 0
    assert pego_diversify(eye[1:3], eye[:, 1:3], 2) == 0
    assert pego_diversify(eye[[1, 1]], eye[:, 1:3], 2) == 1  # by hand: one row in common
    assert pego_diversify(eye[1:2], eye[:, 1:2], 1) == 0  # there is no other one


def test_the_weight_that_is_kept_is_the_one_below_the_group() -> None:
    """Beside a layer, and where the product acts on a weight and the layer shows their sum."""

    class Holder(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.layer = nn.MultiheadAttention(4, 1), nn.Linear(4, 4)

    module, method = Holder(), PEGO(1, 2, targets=["attention", "layer"], exclude=None)
    before = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    method.attach(module)
    for _, form in method.forms(module):
        form.up.data.fill_(1.0)
    found = {name: weight for name, _, weight in frozen_weights(module, method.deltas(module))}
    assert list(found) == [name for name, _ in method.forms(module)]
    assert len(found) == 2
    for name, weight in found.items():
        torch.testing.assert_close(weight, before[name], msg=name)
    assert not torch.allclose(module.attention.in_proj_weight, before["attention.in_proj_weight"])


def test_a_group_that_stays_is_written_as_a_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, base, inputs = Plain(), Plain(), torch.randn(4, 16)
    base.load_state_dict(module.state_dict())
    fit([PEGO(1, 3, keep=True, exclude=None)], module=module)
    lightning_peft.save_peft(module, tmp_path / "adapter")
    lightning_peft.load_peft(base, tmp_path / "adapter")
    torch.testing.assert_close(base(inputs), module(inputs))


def test_a_group_that_is_wider_than_a_weight_is_refused_and_the_advice_works() -> None:
    with pytest.raises(MisconfigurationException, match=r"a rank of 4 together, and model.4.weight has 3.*=\['model.4'\]"):
        fit([PEGO(2, 2, exclude=None)])
    fit([PEGO(2, 2, exclude=["model.4"])], limit_train_batches=1)


@pytest.mark.parametrize("wrong", [{"members": 0}, {"strength": 0.0}])
def test_arguments_below_one_or_zero(wrong: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="must be positive"):
        PEGO(**wrong)
