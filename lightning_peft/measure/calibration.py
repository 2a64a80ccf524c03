"""Calibration of a classifier by several estimators, as it is and after its temperature was fitted.

One estimator at one number of bins can order two networks either way (Nixon et al., 2019, "Measuring calibration in deep
learning"), and much of a difference is often a temperature that one more parameter would mend (Guo et al., ICML 2017). So a
claim about calibration shows them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

WIDTHS = (10, 15, 30)
"""Numbers of bins of equal width."""

_BINS = 15
_STEPS, _WIDEST = 60, 5.0  # halvings of the interval for log T, and its half width


def calibration_table(logits: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """Judge answers by every estimator, as they are and with a fitted temperature.

    The temperature of each half of the samples (every second one) is fitted on the other half, so no sample is judged with
    one that it helped to fit.

    Args:
        logits: Shape ``(samples, classes)``.
        labels: Class indices, shape ``(samples,)``.

    Returns:
        For each estimator its value before and after: expected calibration error in 10, 15 and 30 bins of equal width, in 15
        bins of equal size, class by class in 15 bins, negative log likelihood, Brier score. The row ``"temperature"`` is 1
        and the mean of the two that were fitted.
    """
    logits, labels = logits.double(), labels.long()
    halves = [torch.arange(start, len(labels), 2) for start in (0, 1)]
    temperatures = [fit_temperature(logits[half], labels[half]) for half in reversed(halves)]
    scaled = logits.clone()
    for half, temperature in zip(halves, temperatures, strict=True):
        scaled[half] /= temperature
    before, after = _scores(logits, labels), _scores(scaled, labels)
    table = {name: (value, after[name]) for name, value in before.items()}
    return table | {"temperature": (1.0, sum(temperatures) / 2)}


def mean_table(tables: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, tuple[float, float]]:
    """Mean of each estimator over several tables, such as those of several seeds, before and after.

    Example:
        >>> mean_table([{"Brier score": (0.25, 0.5)}, {"Brier score": (0.75, 0.5)}])
        {'Brier score': (0.5, 0.5)}
    """
    names = tables[0] if tables else {}
    return {name: (fmean(table[name][0] for table in tables), fmean(table[name][1] for table in tables)) for name in names}


def _scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    probabilities = logits.softmax(1)
    sure, chosen = probabilities.max(1)
    right = chosen == labels
    hits = torch.nn.functional.one_hot(labels, logits.shape[1]).double()
    return {
        **{f"ECE, {bins} bins": equal_width_error(sure, right, bins) for bins in WIDTHS},
        f"ECE, {_BINS} bins of equal size": equal_size_error(sure, right, _BINS),
        f"class-wise ECE, {_BINS} bins": classwise_error(probabilities, labels, _BINS),
        "negative log likelihood": float(torch.nn.functional.cross_entropy(logits, labels)),
        "Brier score": float((probabilities - hits).square().sum(1).mean()),
    }


def equal_width_error(confidence: Tensor, correct: Tensor, bins: int) -> float:
    """Expected calibration error in bins of equal width (Guo et al., ICML 2017, equation 3).

    Example:
        >>> equal_width_error(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([True, False, False]), 2)  # 2/3 |.85 - .5| + 1/3 .3
        0.333...
    """
    return _gap(confidence, correct, (confidence * bins).long().clamp(max=bins - 1), bins)


def equal_size_error(confidence: Tensor, correct: Tensor, bins: int) -> float:
    """The same in bins of equally many samples (Nguyen & O'Connor, 2015): crowded confidences do not share one bin.

    Example:
        >>> equal_size_error(torch.tensor([0.99, 0.97, 0.95, 0.5]), torch.tensor([True, True, False, False]), bins=2)
        0.372...
    """
    samples = len(confidence)
    place = torch.empty(samples, dtype=torch.long)
    place[confidence.argsort(stable=True)] = torch.arange(samples) * min(bins, samples) // max(1, samples)
    return _gap(confidence, correct, place, bins)


def classwise_error(probabilities: Tensor, labels: Tensor, bins: int) -> float:
    """Mean over classes of the error of each class's probability (Nixon et al., 2019, static calibration error)."""
    classes = probabilities.shape[1]
    return sum(equal_width_error(probabilities[:, c], labels == c, bins) for c in range(classes)) / classes


def _gap(confidence: Tensor, correct: Tensor, place: Tensor, bins: int) -> float:
    """Mean over samples of how far mean confidence and accuracy are apart in their bin."""
    apart = torch.zeros(bins, dtype=torch.double).index_add_(0, place, confidence.double() - correct.double())
    return float(apart.abs().sum()) / max(1, len(confidence))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the ``T`` that minimises the negative log likelihood of ``logits / T`` (Guo et al., ICML 2017, section 4.2).

    The likelihood is convex in ``1 / T``, so the sign of its slope leads there by halving. Where every answer is right it has
    no minimum; ``T`` ends at the border, ``exp(-5)``.

    Args:
        logits: Shape ``(samples, classes)``.
        labels: Class indices, shape ``(samples,)``.

    Example:
        >>> logits = torch.tensor([[math.log(9.0), 0.0]]).repeat(10, 1)  # says 0.9, is right in 6 of 10
        >>> round(fit_temperature(logits, torch.tensor([0] * 6 + [1] * 4)), 3)  # log 9 / log 1.5
        5.419
    """
    logits = logits.double()
    own = logits.gather(1, labels[:, None].long()).sum()
    finite = logits.where(logits > -math.inf, 0.0)  # of a class that is ruled out, at -inf, the probability is 0
    low, high = -_WIDEST, _WIDEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        inverse = math.exp(-middle)
        slope = float(((logits * inverse).softmax(1) * finite).sum() - own)  # of the likelihood, in 1 / T
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp((low + high) / 2)
