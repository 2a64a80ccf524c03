"""What the recipes' classifiers share: cross-entropy steps, accuracy and calibration, one optimizer with warm-up and cosine.

Ordinary Lightning code; nothing here knows of methods.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


class Classifier(LightningModule):
    """Base of the classifiers; a subclass sets ``model`` and says how a batch becomes logits and labels.

    Logs ``train/loss``, and for each evaluation stage ``<stage>/loss``, ``<stage>/accuracy`` and ``<stage>/ece`` (expected
    calibration error, 15 bins; Guo et al., ICML 2017).

    Args:
        num_classes: Number of classes.
        optimizer: ``"adamw"``, or ``"sgd"`` with Nesterov momentum 0.9.
        lr: Peak learning rate of the pretrained part.
        head_lr_scale: Learning rate of the new head, as a multiple of ``lr``.
        weight_decay: Weight decay of matrices and filters; biases and normalisation parameters have none.
        warmup: Share of all steps in which the learning rate rises linearly; after it a cosine takes it to zero.
        label_smoothing: Label smoothing of the training loss.
    """

    model: nn.Module

    def __init__(
        self,
        num_classes: int,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 1e-3,
        head_lr_scale: float = 1.0,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.optimizer, self.lr, self.head_lr_scale = optimizer, lr, head_lr_scale
        self.weight_decay, self.warmup, self.label_smoothing = weight_decay, warmup, label_smoothing
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "ece": MulticlassCalibrationError(num_classes, n_bins=15),
            }
        )
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val/"), metrics.clone(prefix="test/")

    @abstractmethod
    def logits_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Run the network on a batch.

        Returns:
            Logits, shape ``[batch, classes]``, and class indices, shape ``[batch]``.
        """

    @abstractmethod
    def head(self) -> nn.Module:
        """The new layer on top of the pretrained part."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        logits, labels = self.logits_and_labels(batch)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss, accuracy and calibration on validation data."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss, accuracy and calibration on test data."""
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities, shape ``[batch, classes]``."""
        return self.logits_and_labels(batch)[0].softmax(dim=-1)

    def configure_optimizers(self) -> dict[str, Any]:
        """One optimizer with three parameter groups, stepped per batch by warm-up and cosine."""
        head = list(self.head().parameters())
        in_head = {id(parameter) for parameter in head}
        body = [p for p in self.model.parameters() if id(p) not in in_head]
        groups = [
            {"params": head, "lr": self.lr * self.head_lr_scale, "weight_decay": self.weight_decay},
            {"params": [p for p in body if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in body if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=self.lr)
        else:
            optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True)
        total = self.trainer.estimated_stepping_batches
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, int(total), self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _evaluate(self, batch: Any, stage: str, metrics: MetricCollection) -> None:
        logits, labels = self.logits_and_labels(batch)
        metrics.update(logits.softmax(dim=-1), labels)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log_dict(metrics, batch_size=len(labels), prog_bar=stage == "val")


class ImageClassifier(Classifier):
    """A classifier of ``(image, label)`` batches."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape ``[batch, classes]``, of images, shape ``[batch, 3, height, width]``."""
        return self.model(images)

    def logits_and_labels(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and labels of an ``(image, label)`` batch."""
        images, labels = batch
        return self(images), labels


def warmup_cosine(step: int, total: int, warmup: float, floor: float = 0.0) -> float:
    """Learning-rate factor: linear to 1 over the first ``warmup`` share of ``total`` steps, then half a cosine to ``floor``.

    Example:
        >>> [round(warmup_cosine(step, total=10, warmup=0.2), 2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
        >>> round(warmup_cosine(10, total=10, warmup=0.2, floor=0.1), 2)
        0.1
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))
    return floor + (1 - floor) * cosine
