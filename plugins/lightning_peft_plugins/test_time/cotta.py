"""CoTTA: a slow teacher that averages over views, and weights that are put back at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft.capture.evaluation import Call
from lightning_peft_plugins.test_time._shared.finite_samples import finite_rows
from lightning_peft_plugins.test_time._shared.padding import attention_mask
from lightning_peft_plugins.test_time._shared.teacher import TeacherMethod
from lightning_peft_plugins.test_time.functional.predictions import symmetric_cross_entropy


class CoTTA(TeacherMethod):
    """Trains the whole network towards a teacher, its own moving average, and predicts with the teacher.

    Where the source is unsure of a batch, the teacher averages its logits over random views. After every step each weight
    returns to the source with a small probability. Three sets of weights are held: student, teacher, source.

    Args:
        restore: Probability that a weight returns to the source.
        threshold: Mean confidence of the source below which views are averaged: 0.92 on CIFAR-10, 0.72 on CIFAR-100, 0.1 on
            ImageNet.
        views: Number of views.
        symmetric: Loss in both directions (ImageNet) instead of one (CIFAR).
        seed: Seed of the restoration.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.teacher.TeacherMethod`.

    Example:
        >>> CoTTA(lr=1e-3, optimizer="Adam", threshold=0.92, symmetric=False).views
        32
    """

    paper = "Wang et al.: Continual Test-Time Domain Adaptation, CVPR 2022, https://arxiv.org/abs/2203.13591"

    def __init__(
        self,
        *,
        lr: float = 0.01,
        restore: float = 0.001,
        threshold: float = 0.1,
        views: int = 32,
        symmetric: bool = True,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, **kwargs)
        self.restore, self.threshold = restore, threshold
        self.views, self.symmetric, self.seed = views, symmetric, seed

    def descend(self, call: Call) -> Any:
        with torch.enable_grad():
            output = call()
            logits = self.logits(output)
        self.aligned(call, logits)
        sure = self._source_is_sure(call)
        with self.predicting():
            target = self._target(call, sure)
        rows = finite_rows(logits.detach()) & finite_rows(target)
        if not bool(rows.any()):
            return self.with_logits(output, target)
        with torch.enable_grad():
            if not bool(rows.all()) and len(rows) == call.size:  # backwards, 0 times NaN is NaN
                logits = self.logits(call.take(rows.nonzero().squeeze(-1))())
            losses = symmetric_cross_entropy(logits, target[rows], 0.5 if self.symmetric else 0.0)
            mask = attention_mask(call)
            if mask is not None and mask.numel() == target[..., 0].numel():  # padding is no prediction
                losses = losses[mask.reshape(target.shape[:-1])[rows] > 0]
            loss = losses.mean()
        loss.backward()
        self.note(selected=1.0, loss=float(loss))
        self.step(len(logits))
        self.follow()
        self._restore()
        return self.with_logits(output, target)

    def _source_is_sure(self, call: Call) -> bool:
        confidence = self.predict_with(call, self.source).softmax(-1).amax(-1).nanmean()
        return float(confidence) >= self.threshold

    def _target(self, call: Call, sure: bool) -> Tensor:
        if sure:
            return self.predict_with(call, self.teacher)
        total = self.predict_with(call.with_inputs(self.augment), self.teacher)
        for _ in range(self.views - 1):
            total = total + self.predict_with(call.with_inputs(self.augment), self.teacher)
        return total / self.views

    @torch.no_grad()
    def _restore(self) -> None:
        for name, parameter in self.parameters.items():
            # Half random numbers, which the true half precisions give, are too coarse for a small probability.
            drawn = torch.rand(parameter.shape, generator=self._generator, dtype=torch.float32)
            back = drawn.to(parameter.device) < self.restore
            parameter.copy_(torch.where(back, self.source[name], parameter))

    def forget(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        super().forget()
