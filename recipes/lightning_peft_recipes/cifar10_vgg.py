"""VGG-16 with BatchNorm in the form that pruning papers use for images of 32 pixels."""

from __future__ import annotations

from typing import Literal

from torch import nn

from lightning_peft_recipes.classification import ImageClassifier

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions between one max-pool and the next."""


class CIFAR10VGG(ImageClassifier):
    """Thirteen 3x3 convolutions with BatchNorm and one linear layer, on ``(image, label)`` batches of 32 x 32 pixels.

    Configuration D of Simonyan and Zisserman (ICLR 2015) without its two hidden linear layers, as is usual for CIFAR-10.

    Args:
        num_classes: Number of classes.
        optimizer: See :class:`~lightning_peft_recipes.classification.Classifier`, as for all that follow.
        lr: Peak learning rate.
        weight_decay: Weight decay of matrices and filters.
        warmup: Share of all steps in which the learning rate rises.
        label_smoothing: Label smoothing of the training loss.
    """

    def __init__(
        self,
        num_classes: int = 10,
        optimizer: Literal["adamw", "sgd"] = "sgd",
        lr: float = 0.05,
        weight_decay: float = 5e-4,
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes, optimizer, lr, 1.0, weight_decay, warmup, label_smoothing)
        self.save_hyperparameters()
        self.model: nn.Sequential = vgg16(num_classes)

    def head(self) -> nn.Module:
        """The linear layer."""
        return self.model[-1]


def vgg16(num_classes: int = 10) -> nn.Sequential:
    """The network with random weights.

    Example:
        >>> sum(parameter.numel() for parameter in vgg16().parameters())
        14724042
    """
    layers: list[nn.Module] = []
    before = 3
    for channels, count in STAGES:
        for _ in range(count):
            layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, num_classes))
