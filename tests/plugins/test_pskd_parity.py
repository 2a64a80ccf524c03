"""PSKD against the published numbers and the published loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pskd_toys import CLASSES, EPOCHS, SIZE, Lit, Recorded, close, epoch_loader, fit, loader
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft_plugins.regularizers.functional.pskd import pskd_alpha, soft_cross_entropy, soften_targets
from lightning_peft_plugins.regularizers.pskd import PSKD


def test_official_vectors() -> None:
    assert [pskd_alpha(e, 300, 0.8) for e in (0, 149, 299)] == pytest.approx([0.8 / 300, 0.4, 0.8])
    assert pskd_alpha(500, 300, 0.8) == 0.8
    target = soften_targets(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.5, 0.3, 0.2]), 0.4)
    assert torch.allclose(target, torch.tensor([0.2, 0.72, 0.08]))
    log_probabilities = torch.tensor([[2.0, 0.0, 0.0]]).log_softmax(1)
    assert soft_cross_entropy(log_probabilities, target[None]).item() == pytest.approx(1.839545, abs=1e-6)
    assert soft_cross_entropy(log_probabilities, torch.tensor([[0.0, 1.0, 0.0]])).item() == pytest.approx(2.239545, abs=1e-6)


def test_a_ruled_out_class_counts_nothing() -> None:
    logits = torch.tensor([[1.0, float("-inf"), 0.0]], requires_grad=True)
    loss = soft_cross_entropy(logits.log_softmax(1), torch.tensor([[0.5, 0.0, 0.5]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def with_index(x: Tensor, y: Tensor, index: int) -> tuple[Tensor, Tensor, int]:
    return x, y, index


def official(data: Any, alpha_final: float, epochs: int, smoothing: float = 0.0) -> tuple[list[float], nn.Module, Tensor]:
    """The published loop as its authors wrote it: a full target for every sample, in a loop of our own."""
    module = Lit()
    net = module.net.train()
    optimizer = module.configure_optimizers()
    memory = torch.zeros(SIZE, CLASSES)
    losses = []
    torch.manual_seed(11)
    for epoch in range(epochs):
        alpha = alpha_final * (epoch + 1) / epochs
        for x, y, index in data:
            onehot = F.one_hot(y, CLASSES).float() * (1 - smoothing) + smoothing / CLASSES
            if epoch == 0:
                memory[index] = onehot
            target = (1 - alpha) * onehot + alpha * memory[index]
            logits = net(x)
            loss = -(target * logits.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            memory[index] = logits.detach().softmax(1)
            losses.append(loss.item())
    return losses, net, memory


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sample_index", ["auto", "2"])
def test_equals_the_published_loop(workers: int, sample_index: str) -> None:
    expected, net, memory = official(loader(wrap=with_index, workers=workers), 0.8, EPOCHS)
    method, module = PSKD(0.8, sample_index), Lit()
    wrap = with_index if sample_index == "2" else None
    losses = fit(method, module, loader(wrap=wrap, workers=workers))
    assert losses == pytest.approx(expected, abs=1e-6)
    assert close(module.net, net, 1e-5)
    assert torch.allclose(method.memory.probabilities, memory, atol=1e-5)
    assert torch.allclose(memory.sum(1), torch.ones(SIZE))
    plain = fit(None, Lit(), loader(workers=workers))
    per_epoch = len(plain) // EPOCHS
    assert losses[:per_epoch] == plain[:per_epoch]
    assert losses != pytest.approx(plain, abs=1e-3)


def test_equals_the_published_loop_with_smoothed_labels() -> None:
    expected, *_ = official(loader(wrap=with_index), 0.8, EPOCHS, smoothing=0.1)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    assert fit(PSKD(0.8), Lit(smooth), loader()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0])}])
def test_the_users_part_stays_the_users(options: dict[str, Any]) -> None:
    criterion, reduction = Recorded(**options), options.get("reduction", "mean")
    losses = fit(PSKD(0.8, reduction=reduction), Lit(criterion), epoch_loader(), max_epochs=2)
    assert len(losses) == len(criterion.calls) == 12
    for step in range(6, 12):
        (before, _), (logits, y) = criterion.calls[step - 6], criterion.calls[step]
        soft = -(before.softmax(1) * logits.log_softmax(1)).sum(1)
        expected = 0.2 * F.cross_entropy(logits, y, **options) + 0.8 * getattr(soft, reduction)()
        assert losses[step] == pytest.approx(expected.item(), rel=1e-5)
