"""DeYO: entropy is not enough, the shape of an object has to matter to its prediction."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.capture.evaluation import Call
from lightning_peft_plugins.test_time._shared.entropy import EntropyMethod
from lightning_peft_plugins.test_time.functional.predictions import (
    entropy_margin,
    entropy_weight,
    prediction_drop,
    shuffle_patches,
)


class DeYO(EntropyMethod):
    """Minimises the entropy of predictions that fall when the image's patches are shuffled.

    A prediction that survives the shuffling does not depend on the object's shape and is left out. The more it falls, and the
    surer it was, the more it counts. Images only.

    Args:
        e_threshold: Entropy up to which a prediction is looked at, in units of ``ln(classes)``.
        e_margin: Entropy margin of the weights, same units.
        drop: Fall of the predicted class's probability (PLPD) from which a prediction counts.
        patches: Patches along each side.
        seed: Seed of the shuffling.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.entropy.EntropyMethod`.

    Example:
        >>> DeYO(drop=0.3).drop
        0.3
    """

    paper = (
        "Lee et al.: Entropy is not Enough for Test-Time Adaptation: From the Perspective of Disentangled Factors, ICLR 2024, "
        "https://arxiv.org/abs/2403.07366"
    )

    def __init__(
        self,
        *,
        e_threshold: float = 0.5,
        e_margin: float = 0.4,
        drop: float = 0.2,
        patches: int = 4,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.e_threshold, self.e_margin, self.drop, self.patches, self.seed = e_threshold, e_margin, drop, patches, seed

    def weigh(self, call: Call, logits: Tensor, entropy: Tensor) -> Tensor:
        if logits.shape[1] != 1 or len(logits) != call.size:
            self.one_a_sample(logits, call.size, "shuffled patches say nothing of single pixels")
        classes = logits.shape[-1]
        rows = (entropy < entropy_margin(self.e_threshold, classes)).any(-1).nonzero().squeeze(-1)
        weights = torch.zeros_like(entropy)
        if len(rows):
            destroyed = self.predictions(call.take(rows).with_inputs(self._shuffle)())
            fall = prediction_drop(logits[rows], destroyed)
            weight = entropy_weight(entropy[rows], entropy_margin(self.e_margin, classes)) + fall.exp()
            weights[rows] = torch.where(fall > self.drop, weight, 0.0)
        return weights

    def _shuffle(self, images: Tensor) -> Tensor:
        if images.ndim != 4:
            raise MisconfigurationException(
                f"{self.name} shuffles patches of images (samples, channels, height, width), but the network was given "
                f"{tuple(images.shape)}. For other inputs use EATA or SAR."
            )
        return shuffle_patches(images, self.patches, self._generator)

    def forget(self) -> None:
        super().forget()
        self._generator = torch.Generator().manual_seed(self.seed)
