"""EATA: ETA that holds on to what matters for the source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft import Run
from lightning_peft_plugins.test_time.eta import ETA
from lightning_peft_plugins.test_time.fisher_estimator import Convention, FisherEstimator, network_fisher


class EATA(ETA):
    """ETA with an anti-forgetting penalty: parameters that matter on clean data are held near the source.

    The penalty is ``fisher_alpha * sum F (theta - theta_0)^2`` with the diagonal Fisher information ``F`` of the source network
    on clean data (equations 8 and 9). ``fisher_alpha`` belongs to the official code's convention of ``F``, the squared gradient
    of the mean over a batch; with per-sample scores divide it by about the batch size.

    Args:
        fisher_alpha: Strength of the penalty; 0 is ETA. 2000 on ImageNet, 1 on CIFAR-10.
        fisher: Clean data in the distribution of the training, as a dataloader whose batches the module's step takes (labels
            are not read); or scores by qualified parameter name; or ``None`` to take those of a :class:`FisherEstimator` among
            the Trainer's callbacks.
        fisher_samples: Samples of the dataloader that are scored.
        fisher_convention: As in :func:`lightning_peft.functional.diagonal_fisher`.
        kwargs: Arguments of :class:`ETA`.

    Raises:
        MisconfigurationException: There is no source of Fisher information, or it lacks a parameter.

    Example:
        >>> EATA(fisher_alpha=1.0, d_margin=0.4, lr=1e-3, optimizer="Adam").fisher_alpha
        1.0
    """

    def __init__(
        self,
        *,
        fisher_alpha: float = 2000.0,
        fisher: Iterable[Any] | Mapping[str, Tensor] | None = None,
        fisher_samples: int = 2000,
        fisher_convention: Convention = "batch",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if fisher_alpha < 0:
            raise MisconfigurationException(f"fisher_alpha={fisher_alpha!r} is negative; 0 means no penalty.")
        self.fisher_alpha, self.fisher = fisher_alpha, fisher
        self.fisher_samples, self.fisher_convention = fisher_samples, fisher_convention

    def adapt_start(self, run: Run) -> None:
        super().adapt_start(run)
        self._importance = self._fisher(run) if self.fisher_alpha else {}

    def _fisher(self, run: Run) -> dict[str, Tensor]:
        scores = self.fisher
        if scores is None:
            estimators = [c for c in run.trainer.callbacks if isinstance(c, FisherEstimator)]  # type: ignore[attr-defined]
            scores = next((estimator.scores for estimator in estimators if estimator.scores), None)
        if scores is None:
            raise MisconfigurationException(
                f"{self.name} needs Fisher information of clean data. Pass fisher=<dataloader of clean data>, or train with "
                "FisherEstimator() among the callbacks and test its checkpoint with both, or use ETA, which needs none."
            )
        if not isinstance(scores, Mapping):
            scores = network_fisher(run, self.parameters, scores, self.fisher_samples, self.fisher_convention, self.statistics)
        missing = [name for name in self.parameters if name not in scores]
        if missing:
            raise MisconfigurationException(
                f"{self.name}: the Fisher information lacks {len(missing)} parameters, {', '.join(missing[:3])} among them. "
                "Estimate it with the same targets."
            )
        return {name: scores[name].to(p.device) for name, p in self.parameters.items()}

    @torch.no_grad()
    def add_penalty(self) -> None:
        for name, importance in self._importance.items():
            parameter = self.parameters[name]
            pull = importance * (parameter - self.source[name])
            gradient = (2 * self.fisher_alpha * pull).to(parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
