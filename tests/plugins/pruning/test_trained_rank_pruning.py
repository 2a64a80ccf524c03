"""Trained rank pruning: the official loop by hand, ranks, and the network that is split in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft import LayerGrowth, MaskedPruning, TrainedRankPruning, split_low_rank
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Conv, Plain, deepened
from lightning_peft.testing.runs import assert_same, fit

EVERYTHING: Any = ()


def official(task: Task) -> list[float]:
    """The loop of the official code: every fifth batch truncate before it, and follow the nuclear norm in its step."""
    weights = [weight for weight in task.module.parameters() if weight.ndim > 1]

    @torch.no_grad()
    def truncate() -> list[torch.Tensor]:
        subgradients = []
        for weight in weights:
            u, sigma, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            share = sigma.square().cumsum(0) / sigma.square().sum()
            rank = int((share < 0.9).sum()) + 1
            weight.copy_((u[:, :rank] @ torch.diag(sigma[:rank]) @ v[:rank]).view_as(weight))
            subgradients.append((u[:, :rank] @ v[:rank]).view_as(weight))
        return subgradients

    losses = []
    for step, batch in enumerate(task.batches):
        subgradients = truncate() if step % 5 == 0 else [torch.zeros(())] * len(weights)
        task.optimizer.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        for weight, subgradient in zip(weights, subgradients, strict=True):
            weight.grad += 0.05 * subgradient
        task.optimizer.step()
        losses.append(loss.item())
    truncate()
    return losses


class TestTrainedRankPruning(MethodTester):
    methods = [
        lambda: TrainedRankPruning(exclude=EVERYTHING, nuclear=0.01),
        lambda: TrainedRankPruning(0.95, period=2, scheme="spatial", nuclear=0.0, exclude=EVERYTHING),
    ]
    references = [
        Reference(official, lambda: TrainedRankPruning(0.9, 5, 0.05, exclude=EVERYTHING), style=style, optimizer="sgd")
        for style in (Plain, Conv)
    ]


def test_all_the_energy_and_no_pull_is_a_plain_training() -> None:
    plain = fit([], max_epochs=2)
    same = fit([TrainedRankPruning(1.0, 1, 0.0, exclude=EVERYTHING)], max_epochs=2)
    assert plain.losses == same.losses


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_the_trained_network_is_of_low_rank_and_splits_into_one_that_computes_the_same(scheme: Any) -> None:
    method = TrainedRankPruning(0.7, 2, 0.01, scheme, exclude=EVERYTHING)
    module = fit([method], style=Conv, max_epochs=2).module.eval()
    inputs = torch.randn(5, 16)
    expected = module(inputs)
    ranks = split_low_rank(module, scheme=scheme)
    assert ranks
    for name, rank in ranks.items():
        assert rank == method.ranks[f"{name}.weight"]
    torch.testing.assert_close(module(inputs), expected, rtol=1e-4, atol=1e-5)
    fit([], module=module.train())  # it trains on


def test_a_nuclear_norm_pulls_the_rank_down() -> None:
    def norms(nuclear: float) -> float:
        module = fit([TrainedRankPruning(1.0, 1, nuclear, exclude=EVERYTHING)], optimizer="sgd", max_epochs=5).module
        return sum(float(torch.linalg.matrix_norm(p.detach(), "nuc")) for p in module.parameters() if p.ndim == 2)

    assert norms(0.5) < 0.9 * norms(0.0)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_resume_is_bit_exact_whether_a_step_after_a_truncation_is_due_or_not(period: int, tmp_path: Path) -> None:
    def method() -> TrainedRankPruning:
        return TrainedRankPruning(0.8, period, 0.1, exclude=EVERYTHING)

    whole = fit([method()], after=[every_epoch(tmp_path)], max_epochs=3)
    for epoch in (0, 1):
        path = tmp_path / f"epoch={epoch}.ckpt"
        pulls = torch.load(path, weights_only=True)["callbacks"]["lightning_peft/trained_rank_pruning"]["state"]["pulls"]
        assert bool(pulls) == ((epoch + 1) * 4 % period == 0)
        assert_same(whole, fit([method()], resume=path, seed=9, max_epochs=3), f"resumed after epoch {epoch}")


def test_a_weight_that_cannot_be_decomposed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    plain = fit([])
    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.warns(UserWarning, match="was not truncated"):
        run = fit([TrainedRankPruning(0.5, exclude=EVERYTHING)])
    assert run.losses == plain.losses


def test_layers_that_come_later_are_truncated_too() -> None:
    method = TrainedRankPruning(0.5, 2, targets=["fc1", "fc2"], exclude=EVERYTHING)
    module = fit([LayerGrowth(start=1, to=3, at="step:3"), method], style=deepened(Plain), max_epochs=2).module
    assert len(method.ranks) == 6
    for name, rank in method.ranks.items():
        assert torch.linalg.matrix_rank(module.get_parameter(name).detach(), rtol=1e-4) == rank < 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"energy": 0.0}, "up to 1"),
        ({"energy": 1.1}, "up to 1"),
        ({"period": 0}, "at least 1"),
        ({"nuclear": -1.0}, "would raise the rank"),
        ({"scheme": "NC"}, "choose one of channel, spatial"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        TrainedRankPruning(**arguments)


def test_targets_that_do_not_fit_are_refused() -> None:
    class Line(Plain):
        def build(self) -> None:
            super().build()
            self.extra = nn.Conv1d(4, 4, 3)

    with pytest.raises(MisconfigurationException, match="extra is a Conv1d"):
        fit([TrainedRankPruning(scheme="spatial", exclude=EVERYTHING)], style=Line)
    with pytest.raises(MisconfigurationException, match="is under a weight map of MaskedPruning"):
        fit([TrainedRankPruning(exclude=EVERYTHING), MaskedPruning(0.5, exclude=EVERYTHING)])
