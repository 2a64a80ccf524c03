"""How often a classifier is right on labelled batches, and whether it is as sure as it should be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_peft.baking.plain_network import Inputs, call
from lightning_peft.measure.confidence import Bins, reliability_bins
from lightning_peft.network.labels import labels_of
from lightning_peft.network.logits import as_logits


@dataclass(frozen=True)
class Quality:
    """Quality of a classifier's answers.

    Attributes:
        samples: Number of samples.
        accuracy: Share of right answers.
        ece: Expected calibration error in 15 bins (Guo et al., ICML 2017).
        bins: Mean confidence, accuracy and share of the samples in each bin.
        predictions: Class given to each sample.
    """

    samples: int
    accuracy: float
    ece: float
    bins: Bins
    predictions: tuple[int, ...]


@torch.no_grad()
def judge(network: nn.Module, batches: Iterable[Any], device: torch.device) -> Quality:
    """Run a classifier on labelled batches.

    Args:
        network: Network in evaluation mode, whose logits are ``(batch, classes)``.
        batches: Pairs of inputs and class indices, or mappings with ``labels``.
        device: Where the network is.

    Raises:
        MisconfigurationException: A batch has no labels, the logits are of another shape, or there is no batch.
    """
    accuracy: MulticlassAccuracy | None = None
    confidence: list[float] = []
    right: list[bool] = []
    predictions: list[int] = []
    for batch in batches:
        inputs, labels = split(batch)
        logits = as_logits(call(network, moved(inputs, device))).float().cpu()
        if logits.ndim != 2 or len(logits) != len(labels):
            raise MisconfigurationException(
                f"Accuracy needs logits of shape (batch, classes); the network gave {tuple(logits.shape)} for {len(labels)} "
                "labels. Leave out batches= for networks that do not classify."
            )
        if accuracy is None:
            accuracy = MulticlassAccuracy(logits.shape[1], average="micro")
            calibration = MulticlassCalibrationError(logits.shape[1], n_bins=15)
        probabilities = logits.softmax(-1)
        accuracy.update(probabilities, labels)
        calibration.update(probabilities, labels)
        sure, chosen = probabilities.max(-1)
        confidence += sure.tolist()
        right += (chosen == labels).tolist()
        predictions += chosen.tolist()
    if accuracy is None:
        raise MisconfigurationException("batches= holds no batch. Pass pairs of inputs and labels, such as a DataLoader.")
    bins = reliability_bins(confidence, right)
    return Quality(len(right), float(accuracy.compute()), float(calibration.compute()), bins, tuple(predictions))


def split(batch: Any) -> tuple[Inputs, Tensor]:
    """Split a labelled batch into what the network is called with, and class indices.

    Example:
        >>> split({"input_ids": torch.zeros(1, 2), "labels": torch.tensor([1])})
        ({'input_ids': tensor([[0., 0.]])}, tensor([1]))

    Raises:
        MisconfigurationException: No class indices are found.
    """
    labels = labels_of(batch)
    if labels is None:
        raise MisconfigurationException(
            "A batch has no class indices. Pass pairs (inputs, labels), or mappings with 'labels', labels being integers of "
            "shape (batch,)."
        )
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        return {name: batch[name] for name in batch.keys() if batch[name] is not labels}, labels.cpu()  # noqa: SIM118 - not every batch with keys is a Mapping
    rest = batch[:-1]
    return (rest[0] if len(rest) == 1 else tuple(rest)), labels.cpu()


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """Copy the tensors of inputs to a device."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(inputs, Mapping):
        return {name: move(value) for name, value in inputs.items()}
    return move(inputs) if isinstance(inputs, Tensor) else tuple(move(value) for value in inputs)
