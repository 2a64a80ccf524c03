"""R-AMT: masks that are trained through their bits, and the gradients that what the network knew holds back."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import lightning_peft
from lightning_peft import RAMT
from lightning_peft.functional import distance_from_answers, kept_share
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import assert_same, fit

WEIGHTS = ("model.0.weight", "model.2.weight")


def masks_by_hand(task: Task, dropout: float = 0.9, norm: float = 0.01, temperature: float = 2.0) -> None:
    """Bits as leaves, whose two gradients are taken apart; soft cross-entropy in place of the divergence."""
    module = task.module
    frozen = {name: module.get_parameter(name).detach().clone() for name in WEIGHTS}
    real = {name: torch.full_like(each, 0.01).requires_grad_() for name, each in frozen.items()}
    adam = torch.optim.Adam(real.values(), lr=module.lr)
    for step, (inputs, labels) in enumerate(task.batches):
        bits = {name: (each.detach() > -0.03).float().requires_grad_() for name, each in real.items()}
        logits = functional_call(module, {name: frozen[name] * bits[name] for name in WEIGHTS}, (inputs,))
        teacher = functional_call(module, frozen, (inputs,)).detach()
        soft = -temperature * ((teacher / temperature).softmax(1) * (logits / temperature).log_softmax(1)).sum(1).mean()
        pulls = torch.autograd.grad(temperature * soft, list(bits.values()), retain_graph=True)
        tasks = torch.autograd.grad(F.cross_entropy(logits, labels), list(bits.values()))
        for (name, each), a, b in zip(real.items(), tasks, pulls, strict=True):
            a = a + norm * each.detach() / each.detach().norm()
            share = torch.where(a > 0, 1.0, -1.0) * (a + b) / (a.abs() + b.abs() + 1e-8)
            drawn = torch.rand(a.shape, generator=torch.Generator().manual_seed(zlib.crc32(f"0/{step}/{name}".encode())))
            each.grad = torch.where(drawn < (share + 1) / 2, a, (1 - dropout) * a)
        adam.step()
    with torch.no_grad():
        for name, each in real.items():
            module.get_parameter(name).copy_(torch.where(each > -0.03, frozen[name], 0.0))


class TestRAMT(MethodTester):
    methods = [
        lambda: RAMT(dropout=0.9, threshold=-0.03, norm=0.01, temperature=2.0, checkpoint="full"),
        lambda: RAMT(0.0, norm=0.0, tune=("head", "bias"), targets="all-weights", exclude=(), checkpoint="full"),
    ]
    references = [Reference(masks_by_hand)]


def test_a_gradient_is_kept_the_less_the_more_the_other_objects() -> None:
    """By hand: (1 + sgn(a) (a + b) / (|a| + |b|)) / 2."""
    a, b = torch.tensor([2.0, 2.0, 2.0, -2.0, -1.0]), torch.tensor([0.0, 6.0, -6.0, -1.0, 1.0])
    torch.testing.assert_close(kept_share(a, b), torch.tensor([1.0, 1.0, 0.25, 1.0, 0.5]))


def test_the_distance_is_the_divergence_times_the_squared_temperature() -> None:
    """Answers (3/4, 1/4) against (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2; the softmax of twice the logits at half of them."""
    answers, logits = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(distance_from_answers(logits, answers), expected)
    torch.testing.assert_close(distance_from_answers(logits, 2 * answers, 2.0), 4 * expected)
    tokens = distance_from_answers(logits.expand(3, 5, 2), answers.expand(3, 5, 2))
    torch.testing.assert_close(tokens, expected)


class Masks(Callback):
    """The real masks at the end, and what the network computes before the first step."""

    def __init__(self, method: RAMT) -> None:
        self.method = method

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.first = pl_module(torch.eye(16)).detach()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.real = {mapped.name: mask.real.detach().clone() for mapped, mask in self.method.maps(pl_module)}


def test_it_begins_as_the_network_was_and_leaves_its_weights_but_the_masked_ones() -> None:
    """The network is frozen by its owner, who named no layer."""
    torch.manual_seed(0)
    module = Plain(lr=1e-3)
    module.requires_grad_(False)
    first = module(torch.eye(16)).detach()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    method = RAMT(dropout=0.3)
    masks = Masks(method)
    run = fit([method], module=module, after=[masks], max_epochs=3)
    assert torch.equal(first, masks.first)
    for name, value in run.module.state_dict().items():
        kept = masks.real[name] > 5e-3 if name in WEIGHTS else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value, torch.where(kept, before[name], 0.0)), name
    assert any((real <= 5e-3).any() for real in masks.real.values()), "nothing was masked"
    assert any((real > 5e-3).any() for real in masks.real.values())


def test_input_projections_of_attention_are_masked_by_name() -> None:
    class Attention(Plain):
        def build(self) -> None:
            self.model = nn.Module()
            self.model.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.model.head = nn.Linear(16, 3)
            self.model.forward = self.read

        def read(self, inputs: Tensor) -> Any:
            tokens = inputs.unsqueeze(1)
            return self.model.head(self.model.attention(tokens, tokens, tokens, need_weights=False)[0].squeeze(1))

    method = RAMT(dropout=0.3, targets=["model.attention", "attention.out_proj"])
    masks = Masks(method)
    run = fit([method], module=Attention(lr=1e-3), after=[masks], max_epochs=2)
    assert list(masks.real) == ["model.attention.in_proj_weight", "model.attention.out_proj.weight"]
    masked = masks.real["model.attention.in_proj_weight"] <= 5e-3
    assert masked.any()
    assert not run.module.model.attention.in_proj_weight[masked].any()


def test_files_hold_the_masks_and_resume(tmp_path: Path) -> None:
    class Pretrained(Plain):
        def build(self) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(7)
                super().build()

    run = fit([RAMT(0.5)], style=Pretrained, after=[every_epoch(tmp_path)], max_epochs=2)
    resumed = fit([RAMT(0.5)], style=Pretrained, resume=tmp_path / "epoch=0.ckpt", seed=4, max_epochs=2)
    assert_same(run, resumed, "uninterrupted against resumed")
    again = lightning_peft.load_from_checkpoint(Pretrained, tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(run.module.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 1.5}, "dropout=1.5 must be a share"),
        ({"start": 0.0}, "start=0.0 must be above threshold=0.005"),
        ({"norm": -1.0}, "norm=-1.0 must not be negative"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        RAMT(**arguments)


def test_the_plan_counts_the_masks() -> None:
    assert "masks of 512 weights in 2 tensors, head as they are" in str(lightning_peft.plan(Plain(), [RAMT(tune="head")]))
