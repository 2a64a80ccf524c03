"""What PSKD refuses: impossible arguments, outputs that are not one row a sample, a Trainer without end."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from pskd_toys import Lit, Net, fit, loader
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, nll_loss
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_peft_plugins.regularizers._pskd.checks import check_loss
from lightning_peft_plugins.regularizers.pskd import PSKD


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 1.2},
        {"alpha": -0.1},
        {"epochs": 0},
        {"num_samples": 0},
        {"memory": "disk"},
        {"teacher": "ema"},
        {"dtype": "int8"},
    ],
)
def test_impossible_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(arguments))):
        PSKD(**arguments)


def test_logits_of_tokens_are_refused() -> None:
    class PerToken(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, None].expand(-1, 3, -1)

    class Tokens(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).mean()

    module = Tokens()
    module.net = PerToken()
    with pytest.raises(MisconfigurationException, match=r"shape \(batch, classes\)"):
        fit(PSKD(0.8), module, loader())


def test_a_step_that_repeats_its_samples_is_refused() -> None:
    class Views(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.criterion(self(torch.cat([batch[0], -batch[0]])), batch[1].repeat(2))

    with pytest.raises(MisconfigurationException, match="logits of 8 samples for a batch of 4"):
        fit(PSKD(0.8), Views(), loader())


def test_a_trainer_without_end_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"PSKD\(epochs=...\)"):
        fit(PSKD(0.8), Lit(), loader(), max_epochs=-1)


def _one_hot(y: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(y, 4).float()


LOSSES: dict[str, tuple[Any, str]] = {
    "several labels": (lambda z, y: binary_cross_entropy_with_logits(z, _one_hot(y)), "no cross entropy over the classes"),
    "squared error": (lambda z, y: mse_loss(z, _one_hot(y)), "no cross entropy over the classes"),
    "half ignored": (
        lambda z, y: cross_entropy(z, torch.where(torch.arange(len(y)) % 2 == 0, y, -100)),
        "2 of 4 samples of this batch add nothing",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("teacher", ["memory", "copy"])
def test_a_loss_without_a_label_to_soften_is_refused_and_the_advice_works(name: str, teacher: Any) -> None:
    loss, message = LOSSES[name]
    with pytest.raises(MisconfigurationException, match=message):
        fit(PSKD(0.8, teacher=teacher), Lit(criterion=loss), loader())
    fit(PSKD(0.8, teacher=teacher, check="off"), Lit(criterion=loss), loader())


ACCEPTED: dict[str, Any] = {
    "smoothed": partial(cross_entropy, label_smoothing=0.1),
    "weighted": lambda z, y: cross_entropy(z, y, weight=torch.tensor([1.0, 5.0, 0.1, 2.0], dtype=z.dtype)),
    "summed": partial(cross_entropy, reduction="sum"),
    "mixed targets": lambda z, y: cross_entropy(z, 0.7 * _one_hot(y) + 0.3 * _one_hot(y.flip(0))),
    "focal": lambda z, y: ((1 - z.softmax(1)[range(len(y)), y]).square() * cross_entropy(z, y, reduction="none")).mean(),
    "nll": lambda z, y: nll_loss(z.log_softmax(1), y),
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}], ids=str)
def test_losses_over_a_softmax_are_accepted(name: str, options: dict[str, Any]) -> None:
    fit(PSKD(0.8), Lit(criterion=ACCEPTED[name]), loader(), **options)


def test_a_loss_of_something_else_is_refused() -> None:
    class Elsewhere(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            trained = self(batch[0])
            self(-batch[0])
            return self.criterion(trained, batch[1])

    with pytest.raises(MisconfigurationException, match="does not depend on what the network last returned"):
        fit(PSKD(0.8), Elsewhere(), loader())


def test_a_collate_function_that_sorts_is_refused_and_others_are_not() -> None:
    def longest_first(samples: list[Any]) -> Any:
        return default_collate(sorted(samples, key=lambda sample: float(sample[0][0])))

    def as_they_come(samples: list[Any]) -> Any:
        return default_collate(samples)

    with pytest.raises(MisconfigurationException, match=r"\(longest_first\) reorders the samples"):
        fit(PSKD(0.8), Lit(), loader(collate_fn=longest_first))
    seen = fit(PSKD(0.8), Lit(), loader(collate_fn=as_they_come))
    assert seen == fit(PSKD(0.8), Lit(), loader()), "random numbers are those of a training without a look"


class Identified(Dataset[Any]):
    def __init__(self, step: int) -> None:
        self.step, self.inner = step, loader().dataset

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __getitem__(self, place: int) -> Any:
        return (*self.inner[place][:2], place * self.step)


def test_identifiers_are_not_taken_for_positions() -> None:
    data = DataLoader(Identified(1_000_000), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"look like identifiers.*num_samples="):
        fit(PSKD(0.8, sample_index="2"), Lit(), data)
    highest = 1_000_000 * len(data.dataset)  # type: ignore[arg-type]
    fit(PSKD(0.8, sample_index="2", num_samples=highest), Lit(), data)
    fit(PSKD(0.8, sample_index="2"), Lit(), DataLoader(Identified(100), batch_size=4))


def test_a_cross_entropy_that_is_learnt_already_is_not_taken_for_another_loss() -> None:
    for margin in torch.arange(5, 20, 0.05).tolist():
        scattered = torch.randn(16, 14, generator=torch.Generator().manual_seed(0))
        logits = (scattered + margin * torch.eye(14)[0]).requires_grad_()
        check_loss(cross_entropy(logits, torch.zeros(16, dtype=torch.long)), logits)
