"""ETA: entropy minimisation on reliable and non-redundant predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft_plugins.test_time._shared.entropy import EntropyMethod
from lightning_peft_plugins.test_time.functional.predictions import entropy_margin, entropy_weight, redundancy


class ETA(EntropyMethod):
    """Minimises the entropy of predictions that are reliable and that say something new.

    A prediction is reliable if its entropy is below ``e_margin * ln(classes)``, and redundant if its cosine with the moving
    average of the predictions chosen before reaches ``d_margin``; the surer it is, the more it counts (equations 2 to 6).
    A batch without a chosen prediction changes nothing, momentum included.

    Args:
        e_margin: Entropy margin, in units of ``ln(classes)``.
        d_margin: Cosine from which a prediction is redundant. Few classes need a larger one: 0.4 on CIFAR-10.
        official: Keep the moving average across resets, as the official code does.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.entropy.EntropyMethod`.

    Example:
        >>> ETA(d_margin=0.4).d_margin
        0.4
    """

    paper = "Niu et al.: Efficient Test-Time Model Adaptation without Forgetting, ICML 2022, https://arxiv.org/abs/2204.02610"

    weighs_in_threads = True

    def __init__(self, *, e_margin: float = 0.4, d_margin: float = 0.05, official: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.e_margin, self.d_margin, self.official = e_margin, d_margin, official
        self._average: Tensor | None = None

    def weigh(self, call: Call, logits: Tensor, entropy: Tensor) -> Tensor:
        margin = entropy_margin(self.e_margin, logits.shape[-1])
        chosen = entropy < margin
        if self._average is not None:
            probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            cosine = redundancy(probabilities.flatten(0, 1), self._average).view_as(entropy)
            chosen &= cosine.abs() < self.d_margin
        return torch.where(chosen, entropy_weight(entropy, margin), 0.0)

    def settle(self, chosen: Tensor) -> None:
        mean = chosen.mean(0)
        self._average = mean if self._average is None else 0.9 * self._average + 0.1 * mean

    def adapt_start(self, run: Run) -> None:
        self._average = None  # whatever forget() keeps for official=True
        super().adapt_start(run)

    def forget(self) -> None:
        super().forget()
        if not self.official:
            self._average = None


class RDumb(ETA):
    """ETA that returns to the source every 1000 batches, whatever happens: a baseline that long streams need to beat.

    Args:
        reset: When to return to the source: a number of batches, whether or not they brought an update, or as with others.
        kwargs: Arguments of :class:`ETA`.

    Example:
        >>> RDumb().reset
        1000
    """

    paper = "Press et al.: RDumb: A simple approach that questions our progress in continual TTA, NeurIPS 2023, https://arxiv.org/abs/2306.05401"

    def __init__(self, *, reset: Any = 1000, **kwargs: Any) -> None:
        super().__init__(reset=reset, **kwargs)

    def count(self) -> int:
        return self.batches
