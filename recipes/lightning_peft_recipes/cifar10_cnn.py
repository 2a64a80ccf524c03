"""A small convolutional network with BatchNorm for CIFAR-10, trained by somebody else and read out of a package."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.assets import open_member
from lightning_peft_recipes.assets import CIFAR10_CNN
from lightning_peft_recipes.cifar10 import MEAN, STD
from lightning_peft_recipes.classification import ImageClassifier

MEMBER = "cifar_10_model/trained_models/cnn_model.h5"
CHANNELS = (64, 64, 128, 128, 64, 64)
FEATURES = (64, 1024, 512)


class CIFAR10CNN(ImageClassifier):
    """Six convolutions with BatchNorm and three linear layers on ``(image, label)`` batches of normalised CIFAR-10 images.

    As packaged it is right on 80.14 % of the 10,000 test images. It takes images as
    :class:`~lightning_peft_recipes.cifar10.CIFAR10DataModule` gives them.

    Args:
        weights: ``"packaged"`` for those of the pinned package, or ``None`` for random ones.
        num_classes: Number of classes; the packaged weights have 10.
        optimizer: See :class:`~lightning_peft_recipes.classification.Classifier`, as for all that follow.
        lr: Peak learning rate.
        head_lr_scale: Learning rate of the last layer, as a multiple of ``lr``.
        weight_decay: Weight decay of matrices and filters.
        warmup: Share of all steps in which the learning rate rises.
        label_smoothing: Label smoothing of the training loss.

    Raises:
        MisconfigurationException: h5py is missing.
    """

    def __init__(
        self,
        weights: Literal["packaged"] | None = "packaged",
        num_classes: int = 10,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 1e-3,
        head_lr_scale: float = 1.0,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes, optimizer, lr, head_lr_scale, weight_decay, warmup, label_smoothing)
        self.save_hyperparameters()
        self.model: nn.Sequential = cnn(num_classes)
        if weights == "packaged":
            load_packaged(self.model)

    def head(self) -> nn.Module:
        """The last linear layer."""
        return self.model[-2]


def cnn(num_classes: int = 10) -> nn.Sequential:
    """The network with random weights, for images of 32 pixels; BatchNorm comes after the activation."""
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise((3, *CHANNELS))):
        layers += [nn.Conv2d(before, after, 3), nn.ReLU(), nn.BatchNorm2d(after, eps=1e-3)]
        if index in (1, 3):
            layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for before, after in pairwise(FEATURES):
        layers += [nn.Linear(before, after), nn.ReLU()]
    # The logits pass a last ReLU, as their author has it.
    return nn.Sequential(*layers, nn.Linear(FEATURES[-1], num_classes), nn.ReLU())


def load_packaged(network: nn.Sequential) -> None:
    """Load the packaged Keras weights into :func:`cnn`.

    They expect raw pixels. As the first convolution has no padding, the scaling of
    :func:`~lightning_peft_recipes.cifar10.normalise` is undone exactly within its weights.

    Raises:
        MisconfigurationException: h5py is missing.
    """
    try:
        import h5py
    except ImportError as error:
        raise MisconfigurationException(f'the CIFAR-10 CNN needs: pip install "lightning-peft[vision]" ({error})') from error
    kinds = {"conv2d": nn.Conv2d, "batch_normalization": nn.BatchNorm2d, "dense": nn.Linear}
    with h5py.File(open_member(CIFAR10_CNN, MEMBER), "r") as file, torch.no_grad():
        stored = file["model_weights"]
        for kind, layer_type in kinds.items():
            for index, layer in enumerate(layer for layer in network if isinstance(layer, layer_type)):
                name = f"{kind}_{index}" if index else kind
                values = {key.split(":")[0]: np.asarray(value) for key, value in stored[name][name].items()}
                for own, key in KERAS[kind].items():
                    getattr(layer, own).copy_(torch.from_numpy(values[key].transpose(TRANSPOSED.get(values[key].ndim))))
        first = network[0]
        assert isinstance(first, nn.Conv2d)
        mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        first.bias += (first.weight * mean).sum((1, 2, 3))
        first.weight *= std


# Names of tensors here and there, and how filters [height, width, in, out] and matrices [in, out] are turned.
KERAS = {
    "conv2d": {"weight": "kernel", "bias": "bias"},
    "batch_normalization": {
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    },
    "dense": {"weight": "kernel", "bias": "bias"},
}
TRANSPOSED = {4: (3, 2, 0, 1), 2: (1, 0)}
