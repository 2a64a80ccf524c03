"""PSKD in training: the contract, where it changes nothing, and the settings it must work in."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from pskd_toys import EPOCHS, SIZE, Lit, close, epoch_loader, fit, loader, trainer
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.attaching.hub import apply_terms
from lightning_peft.compose.loss import NonFiniteLossError
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing import loader as toy_loader
from lightning_peft.testing.modules import BatchNorm, Root
from lightning_peft.testing.toys import ToyScale
from lightning_peft_plugins.regularizers.pskd import PSKD


def published(task: Task) -> None:
    """Kim et al., equations 4 and 5: targets soften with what was predicted for the same samples an epoch before."""
    past: dict[int, Tensor] = {}
    for epoch, batches in enumerate(task.epochs):
        share = 0.8 * (epoch + 1) / len(task.epochs)
        for place, (inputs, labels) in enumerate(batches):
            logits = task.module.logits(inputs)
            hard = F.one_hot(labels, logits.shape[1]).float()
            target = (1 - share) * hard + share * past.get(place, hard)
            task.step(-(target * logits.log_softmax(1)).sum(1).mean())
            past[place] = logits.detach().softmax(1)


def taught_by_the_epoch_before(task: Task) -> None:
    """The same with a teacher, the network as the epoch before left it, which evaluates the inputs at hand."""
    teacher: Any = None
    for epoch, batches in enumerate(task.epochs):
        share = 0.8 * (epoch + 1) / len(task.epochs) if teacher else 0.0
        for inputs, labels in batches:
            log_p = task.module.logits(inputs).log_softmax(1)
            loss = (1 - share) * F.nll_loss(log_p, labels)
            if teacher:
                with torch.no_grad():
                    soft = teacher.logits(inputs).softmax(1)
                loss = loss - share * (soft * log_p).sum(1).mean()
            task.step(loss)
        teacher = copy.deepcopy(task.module).eval()


class TestContract(MethodTester):
    methods = [PSKD, lambda: PSKD(0.5, memory="mapped"), lambda: PSKD(teacher="copy")]
    references = [
        Reference(published),
        Reference(published, style=BatchNorm, optimizer="sgd"),
        Reference(taught_by_the_epoch_before, lambda: PSKD(teacher="copy"), style=BatchNorm, optimizer="sgd"),
    ]
    no_stream = "samples have no index|epochs="


def test_alpha_zero_is_plain_training_bit_for_bit() -> None:
    plain, with_method = Lit(), Lit()
    assert fit(None, plain, loader()) == fit(PSKD(0.0), with_method, loader())
    assert close(plain, with_method, 0.0)


def test_accumulation_divides_the_sum() -> None:
    expected = fit(PSKD(0.8), Lit(dropout=0.0), loader(), max_steps=1)
    losses = fit(PSKD(0.8), Lit(dropout=0.0), loader(), accumulate_grad_batches=2)
    assert losses[0] == pytest.approx(expected[0], abs=1e-6)
    assert len(losses) == EPOCHS * 6


def test_bf16_keeps_a_float32_memory() -> None:
    method = PSKD(0.8)
    losses = fit(method, Lit(), loader(), precision="bf16-mixed")
    assert method.memory.probabilities.dtype == torch.float32
    assert torch.allclose(method.memory.probabilities.sum(1), torch.ones(SIZE), atol=1e-5)
    assert losses == pytest.approx(fit(PSKD(0.8), Lit(), loader()), abs=0.1)


def test_manual_optimization_and_repeated_evaluation() -> None:
    """A step that evaluates its batch twice (a closure) remembers the first prediction and reads the old one twice."""

    class Twice(Lit):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.automatic_optimization = False
            self.pairs: list[tuple[float, float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            first = apply_terms(self, self.criterion(self(batch[0]), batch[1]))
            second = apply_terms(self, self.criterion(self(batch[0]), batch[1]))
            self.pairs.append((first.item(), second.item()))
            optimizer.zero_grad()
            self.manual_backward(second)
            optimizer.step()

    module = Twice()
    torch.manual_seed(0)
    trainer(PSKD(0.8)).fit(module, loader())
    assert all(first == second for first, second in module.pairs)


def test_after_the_learning_rate_finder() -> None:
    class Tuned(Lit):
        lr = 0.1

    method = PSKD(0.8)
    losses = fit(method, Tuned(), epoch_loader(size=64), callbacks=[LearningRateFinder(num_training_steps=8)])
    assert len(losses) == 16 * EPOCHS
    assert method.memory.seen.all()


def test_a_row_that_is_not_finite_never_enters() -> None:
    class Breaks(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            self.net.head.bias.data.fill_(float("nan") if self.current_epoch == 1 else 0.0)
            return self.criterion(logits, batch[1])

    method = PSKD(0.8)
    with pytest.raises(NonFiniteLossError):
        fit(method, Breaks(), loader())
    assert torch.isfinite(method.memory.probabilities).all()
    assert method.memory.seen.all()


def test_logs_alpha_coverage_and_its_loss() -> None:
    logged: list[dict[str, float]] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    fit(PSKD(0.8), Lit(), loader(), callbacks=[Watch()], log_every_n_steps=1)
    assert [row["peft/pskd/alpha"] for row in logged] == pytest.approx([0.8 / 3, 1.6 / 3, 0.8])
    assert logged[-1]["peft/pskd/coverage"] == 1.0
    assert logged[0]["peft/loss/pskd"] == 0.0
    assert logged[-1]["peft/loss/pskd"] > 0.0


def test_teacher_copy_beside_weight_maps_and_of_the_module_itself() -> None:
    def trained(*callbacks: Callback) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = Root()
        trainer(*callbacks).fit(module, toy_loader(), toy_loader())
        assert "forward" not in vars(module)
        return dict(module.state_dict())

    for others in ([ToyScale], []):
        taught, alone = trained(PSKD(0.8, teacher="copy"), *(each() for each in others)), trained(*(each() for each in others))
        assert all((taught[name] - alone[name]).abs().max() > 1e-4 for name in alone), "the teacher taught nothing"
