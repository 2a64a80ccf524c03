"""Estimators of calibration against torchmetrics, hand arithmetic and an optimizer of another kind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.functional.classification import binary_calibration_error

from lightning_peft.measure.calibration import (
    calibration_table,
    classwise_error,
    equal_size_error,
    equal_width_error,
    fit_temperature,
)


def answers(samples: int, temperature: float, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of which labels are drawn, sharpened by a temperature that makes them as sure as they should not be."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return logits * temperature, labels


@pytest.mark.parametrize("bins", [10, 15, 30])
def test_bins_of_equal_width_are_those_of_torchmetrics(bins: int) -> None:
    logits, labels = answers(700, 1.7)
    probabilities = logits.softmax(1)
    metric = MulticlassCalibrationError(5, n_bins=bins)
    metric.update(probabilities, labels)
    sure, chosen = probabilities.max(1)
    assert equal_width_error(sure, chosen == labels, bins) == pytest.approx(metric.compute().item(), abs=1e-6)


def test_class_by_class_is_the_mean_of_binary_errors() -> None:
    logits, labels = answers(300, 1.3, classes=3)
    probabilities = logits.softmax(1)
    # Of a binary classifier torchmetrics takes the probability of the class as its confidence.
    expected = [
        binary_calibration_error(probabilities[:, c].contiguous(), (labels == c).long(), n_bins=15).item() for c in range(3)
    ]
    assert classwise_error(probabilities, labels, 15) == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_bins_of_equal_size_by_hand() -> None:
    sure = torch.tensor([0.5, 0.99, 0.95, 0.97, 0.96, 0.98])
    right = torch.tensor([False, True, False, True, True, True])
    # (.5, .95), (.96, .97), (.98, .99): 1.45 of the first two are wrong, 0.07 and 0.03 of right ones are missing.
    assert equal_size_error(sure, right, 3) == pytest.approx((1.45 + 0.07 + 0.03) / 6, abs=1e-6)
    assert equal_size_error(sure[:2], right[:2], 15) == pytest.approx((0.5 + 0.01) / 2, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_is_that_of_an_optimizer(temperature: float) -> None:
    logits, labels = answers(400, temperature)
    inverse = torch.ones((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(logits.double() * inverse, labels)
        value.backward()
        return value

    optimizer.step(loss)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(1 / inverse.item(), rel=1e-4)
    assert found == pytest.approx(temperature, rel=0.15), "labels were drawn at 1"


def test_a_temperature_mends_what_it_made_and_leaves_accuracy() -> None:
    logits, labels = answers(4000, 3.0)
    table = calibration_table(logits, labels)
    assert list(table)[:3] == ["ECE, 10 bins", "ECE, 15 bins", "ECE, 30 bins"]
    for name, (before, after) in table.items():
        assert after < before or name == "temperature", name
    assert table["ECE, 15 bins"][0] > 0.1 > 0.03 > table["ECE, 15 bins"][1]
    assert table["temperature"][1] == pytest.approx(3.0, rel=0.1)


def test_no_sample_is_judged_with_a_temperature_it_helped_to_fit() -> None:
    logits, labels = answers(400, 1.0)
    logits[::2] *= 5.0  # every second one is too sure
    table = calibration_table(logits, labels)
    scaled = logits.double().clone()
    scaled[::2] /= fit_temperature(logits[1::2], labels[1::2])
    scaled[1::2] /= fit_temperature(logits[::2], labels[::2])
    expected = torch.nn.functional.cross_entropy(scaled, labels).item()
    assert table["negative log likelihood"][1] == pytest.approx(expected)
    assert table["negative log likelihood"][1] > table["negative log likelihood"][0], "each is given the other's"


def test_perfect_answers_and_few() -> None:
    table = calibration_table(torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]), torch.tensor([0, 1, 0]))
    assert all(math.isfinite(value) for pair in table.values() for value in pair)


def test_classes_that_are_ruled_out_change_nothing_but_the_mean_over_classes() -> None:
    logits, labels = answers(400, 3.0)
    ruled_out = torch.cat([logits, torch.full((400, 1), -math.inf)], 1)
    table, wider = calibration_table(logits, labels), calibration_table(ruled_out, labels)
    classwise = "class-wise ECE, 15 bins"
    classes = logits.shape[1]
    for name, pair in table.items():
        share = classes / (classes + 1) if name == classwise else 1
        assert wider[name] == pytest.approx([share * value for value in pair]), name
