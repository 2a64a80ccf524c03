"""Tiny modules for methods that act at evaluation: their networks see images, have norm layers and are sure of themselves."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.testing.modules import CLASSES, Plain, loader


def picture_loader(samples: int = 32, batch_size: int = 8, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """The samples of :func:`~lightning_peft.testing.modules.loader` as images, ``(batch, 1, 4, 4)``, and labels."""
    inputs, labels = loader(samples, seed=seed).dataset.tensors  # type: ignore[attr-defined]
    return DataLoader(TensorDataset(inputs.view(-1, 1, 4, 4), labels), batch_size=batch_size)


class Pictures(Plain):
    """Classifies images of 4x4 pixels, or vectors of 16 numbers as such; remembers what its network answered in evaluations.

    Attributes:
        answers: Logits of each batch, ``(batch, 3)``.
        certainty: Factor of the head's weights.
    """

    certainty: ClassVar[float]

    def build(self) -> None:
        self.answers: list[Tensor] = []
        self.model = nn.Sequential(*self.body(), nn.Linear(16, CLASSES))
        self.model[-1].weight.data *= self.certainty  # some predictions must be sure enough to learn from

    def body(self) -> list[nn.Module]:
        """Layers from the image to 16 features."""
        raise NotImplementedError

    def logits(self, inputs: Tensor) -> Tensor:
        """The outputs that the loss is computed from."""
        logits: Tensor = self.model(inputs.view(-1, 1, 4, 4))
        if not self.training:
            self.answers.append(logits.detach().clone())
        return logits

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.base_loss(batch)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.logits(batch[0])


class BatchNormPictures(Pictures):
    """Convolutions with BatchNorm, through which the samples of a batch depend on each other."""

    certainty = 10.0

    def body(self) -> list[nn.Module]:
        """Layers from the image to 16 features."""
        first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        pool = nn.AdaptiveAvgPool2d(1)
        return [first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(16), nn.ReLU(), pool, nn.Flatten()]


class LayerNormPictures(Pictures):
    """Linear layers with LayerNorm."""

    certainty = 3.0

    def body(self) -> list[nn.Module]:
        """Layers from the image to 16 features."""
        return [nn.Flatten(), nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16)]
