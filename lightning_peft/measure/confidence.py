"""How sure a classifier is against how often it is right, gathered during ``test`` from any module."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_peft.measure.calibration import calibration_table
from lightning_peft.measure.network_calls import NetworkCalls
from lightning_peft.network.labels import labels_of
from lightning_peft.network.logits import as_logits
from lightning_peft.strategies.ranks import of_ranks

Bins = list[tuple[float, float, float]]

MOST = 2**27
"""Logits of a test set that are kept; ImageNet's validation set has 50 million."""


class ConfidenceRecorder(NetworkCalls):
    """Records confidence and correctness of every test sample.

    Logits come from the network's own calls, labels from the batch. A module whose network or labels cannot be told apart is
    left alone, and nothing is recorded.

    Attributes:
        confidence: Highest probability of each sample.
        correct: Whether that class was right.
        logits: Logits of each batch, in float32 on the CPU; empty as soon as there are more numbers than :data:`MOST`.
        labels: Labels of each batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.confidence: list[float] = []
        self.correct: list[bool] = []
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self._numbers = 0

    def table(self, samples: Tensor | None = None) -> dict[str, tuple[float, float]]:
        """Judge calibration by every estimator (:func:`~lightning_peft.measure.calibration.calibration_table`).

        Args:
            samples: Which samples to judge, as a mask; by default all.

        Returns:
            The estimators; none where no logits were kept.
        """
        if not self.logits:
            return {}
        logits, labels = torch.cat(self.logits), torch.cat(self.labels)
        return calibration_table(logits, labels) if samples is None else calibration_table(logits[samples], labels[samples])

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the network and listen, if there is one."""
        with suppress(MisconfigurationException):
            super().on_test_start(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take logits and labels of this batch."""
        if self._tap is None:
            return
        calls = list(self._tap.calls)
        self._tap.close()
        labels = labels_of(batch)
        if len(calls) != 1 or labels is None:
            return
        try:
            logits = as_logits(calls[0].output).detach()
        except MisconfigurationException:
            return
        if logits.ndim == 2 and logits.shape[0] == labels.shape[0]:
            confidence, predicted = logits.float().softmax(-1).max(-1)
            self.confidence += confidence.tolist()
            self.correct += (predicted == labels).tolist()
            self._keep(logits, labels)

    def gather(self) -> None:
        """Take what other processes saw; every one has to ask, once, after the test."""
        ranks = of_ranks((self.confidence, self.correct, self.logits, self.labels))
        self.confidence, self.correct, self.logits, self.labels = ([*chain(*column)] for column in zip(*ranks, strict=True))
        if not all(logits for _, _, logits, _ in ranks) or sum(batch.numel() for batch in self.logits) > MOST:
            self.logits, self.labels = [], []

    def _keep(self, logits: Tensor, labels: Tensor) -> None:
        self._numbers += logits.numel()
        if self._numbers > MOST:
            self.logits, self.labels = [], []
        else:
            self.logits.append(logits.to("cpu", torch.float32, copy=True))  # a view would hold all it is of
            self.labels.append(labels.cpu())


def reliability_bins(confidence: list[float], correct: list[bool], bins: int = 15) -> Bins:
    """Sort samples into bins of equal width by confidence (Guo et al., ICML 2017, figure 1).

    Returns:
        For each bin mean confidence, accuracy and share of the samples; zeros for an empty one.

    Example:
        >>> reliability_bins([0.9, 0.8, 0.3], [True, False, False], bins=2)
        [(0.3, 0.0, 0.333...), (0.85, 0.5, 0.666...)]
    """
    sums = [[0.0, 0, 0] for _ in range(bins)]
    for sure, right in zip(confidence, correct, strict=True):
        row = sums[min(int(sure * bins), bins - 1)]
        row[0] += sure
        row[1] += right
        row[2] += 1
    total = max(len(confidence), 1)
    return [(round(sure / n, 6), right / n, n / total) if n else (0.0, 0.0, 0.0) for sure, right, n in sums]
