"""ROID: certain and diverse predictions, the source mixed back in, and a corrected prior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft.capture.evaluation import Call
from lightning_peft.network.logits import with_logits
from lightning_peft_plugins.test_time._shared.finite_samples import finite_rows
from lightning_peft_plugins.test_time._shared.views import ViewMethod
from lightning_peft_plugins.test_time.functional.predictions import softmax_entropy, symmetric_cross_entropy
from lightning_peft_plugins.test_time.functional.roid import prior_corrected, soft_likelihood_ratio


class ROID(ViewMethod):
    """Trains on predictions that are certain and unlike the usual ones, and drifts back to the source all the time.

    The loss is a soft likelihood ratio, whose gradient does not vanish for sure predictions as that of the entropy does, with a
    consistency term over a random view. After every step the parameters move a little towards the source; what comes back
    as logits is weighed by the smoothed mean prediction of the batch.

    Args:
        source_momentum: Share of the adapted parameters that stays after every step.
        average_momentum: Momentum of the mean prediction that diversity is measured against.
        temperature: Of the weights.
        consistency: Whether the term over a random view is used.
        prior_correction: Whether logits are corrected.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.views.ViewMethod`.

    Example:
        >>> ROID(consistency=False).source_momentum
        0.99
    """

    paper = (
        "Marsden et al.: Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior Correction, "
        "WACV 2024, https://arxiv.org/abs/2306.00650"
    )

    def __init__(
        self,
        *,
        source_momentum: float = 0.99,
        average_momentum: float = 0.9,
        temperature: float = 1 / 3,
        consistency: bool = True,
        prior_correction: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source_momentum, self.average_momentum, self.temperature = source_momentum, average_momentum, temperature
        self.consistency, self.prior_correction = consistency, prior_correction

    def descend(self, call: Call) -> Any:
        with torch.enable_grad():
            with self.predicting():
                output = call()
            logits = self.logits(output)
        self.one_a_sample(logits, call.size, "it weighs samples and corrects the prior of their classes")
        finite = finite_rows(logits.detach())
        if not bool(finite.any()):
            return output
        weights = torch.zeros(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        weights[finite] = self._weights(logits.detach()[finite])
        chosen = weights > 0
        rows = chosen.nonzero().squeeze(-1)
        if len(rows):
            with torch.enable_grad():
                loss = (soft_likelihood_ratio(logits[rows]) * weights[rows]).sum()
                if self.consistency:
                    view = self.logits(call.take(rows).with_inputs(self.augment)())
                    loss = loss + (symmetric_cross_entropy(view, logits[rows]) * weights[rows]).sum()
                loss = loss / call.size
            loss.backward()
        self.note(selected=len(rows) / call.size, loss=float(loss) if len(rows) else 0.0)
        self.step(len(rows))
        self.ensemble()
        if not self.prior_correction:
            return output
        corrected = logits.detach().clone()
        corrected[finite] = prior_corrected(corrected[finite])
        return with_logits(output, corrected)

    def _weights(self, logits: Tensor) -> Tensor:
        p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if self._average is None:
            self._average = torch.full_like(p[0], 1 / p.shape[-1])
        diversity = _spread(1 - torch.nn.functional.cosine_similarity(self._average[None], p, dim=-1))
        certainty = _spread(-softmax_entropy(logits).to(p.dtype))
        weights = (diversity * certainty / self.temperature).exp()
        self._average = self.average_momentum * self._average + (1 - self.average_momentum) * p.mean(0)
        return torch.where((diversity < diversity.mean()) | weights.isnan(), 0.0, weights)

    @torch.no_grad()
    def ensemble(self) -> None:
        """Mix the parameters with others after a step."""
        for name, parameter in self.parameters.items():
            parameter.lerp_(self.source[name], 1 - self.source_momentum)

    def forget(self) -> None:
        self._average: Tensor | None = None
        super().forget()


def _spread(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
