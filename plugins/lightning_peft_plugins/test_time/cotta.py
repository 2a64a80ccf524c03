"""CoTTA: a slow teacher that averages over views, and weights that are put back at random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft.network.called_with import call_with
from lightning_peft.network.targets import TargetSpec
from lightning_peft_plugins.test_time._shared.descent import fine_copy
from lightning_peft_plugins.test_time._shared.finite_samples import finite_rows
from lightning_peft_plugins.test_time._shared.padding import attention_mask
from lightning_peft_plugins.test_time._shared.views import ViewMethod
from lightning_peft_plugins.test_time.functional.predictions import symmetric_cross_entropy


class CoTTA(ViewMethod):
    """Trains the whole network towards a teacher, its own moving average, and predicts with the teacher.

    Where the source is unsure of a batch, the teacher averages its logits over random views. After every step each weight
    returns to the source with a small probability. Three sets of weights are held: student, teacher, source.

    Args:
        teacher_momentum: Momentum of the teacher.
        restore: Probability that a weight returns to the source.
        threshold: Mean confidence of the source below which views are averaged: 0.92 on CIFAR-10, 0.72 on CIFAR-100, 0.1 on
            ImageNet.
        views: Number of views.
        symmetric: Loss in both directions (ImageNet) instead of one (CIFAR).
        seed: Seed of the restoration.
        targets: Layers whose parameters move; ``None`` is the weights and biases of the whole module, as in the official code:
            no class token, no embedding of positions.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.views.ViewMethod`.

    Example:
        >>> CoTTA(lr=1e-3, optimizer="Adam", threshold=0.92, symmetric=False).views
        32
    """

    paper = "Wang et al.: Continual Test-Time Domain Adaptation, CVPR 2022, https://arxiv.org/abs/2203.13591"

    def __init__(
        self,
        *,
        lr: float = 0.01,
        teacher_momentum: float = 0.999,
        restore: float = 0.001,
        threshold: float = 0.1,
        views: int = 32,
        symmetric: bool = True,
        seed: int = 0,
        targets: TargetSpec | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, targets=targets, **kwargs)
        self.teacher_momentum, self.restore, self.threshold = teacher_momentum, restore, threshold
        self.views, self.symmetric, self.seed = views, symmetric, seed
        self.teacher: dict[str, Tensor] = {}

    def claims(self, module: nn.Module) -> Iterable[str]:
        found = list(super().claims(module))
        if self.targets is not None:
            return found
        return [name for name in found if name.rpartition(".")[2] in ("weight", "bias")] or found

    def adapt_start(self, run: Run) -> None:
        prefix = f"{run.network_name}." if run.network_name else ""
        self._inner_name = lambda name: name.removeprefix(prefix)
        super().adapt_start(run)

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
        self._follow()
        return self.with_logits(output, target)

    def _source_is_sure(self, call: Call) -> bool:
        confidence = self._predict(call, self.source).softmax(-1).amax(-1).nanmean()
        return float(confidence) >= self.threshold

    def _target(self, call: Call, sure: bool) -> Tensor:
        if sure:
            return self._predict(call, self.teacher)
        total = self._predict(call.with_inputs(self.augment), self.teacher)
        for _ in range(self.views - 1):
            total = total + self._predict(call.with_inputs(self.augment), self.teacher)
        return total / self.views

    def _predict(self, call: Call, weights: dict[str, Tensor]) -> Tensor:
        assert self.run is not None
        named = {self._inner_name(name): value.to(self.source[name].dtype) for name, value in weights.items()}
        return self.logits(call_with(self.run.network, named, call.args, call.kwargs))

    @torch.no_grad()
    def _follow(self) -> None:
        for name, parameter in self.parameters.items():
            self.teacher[name].lerp_(parameter.to(self.teacher[name].dtype), 1 - self.teacher_momentum)
            # Half random numbers, which the true half precisions give, are too coarse for a small probability.
            drawn = torch.rand(parameter.shape, generator=self._generator, dtype=torch.float32)
            back = drawn.to(parameter.device) < self.restore
            parameter.copy_(torch.where(back, self.source[name], parameter))

    def forget(self) -> None:
        self.teacher = fine_copy(self.source)
        self._generator = torch.Generator().manual_seed(self.seed)
        super().forget()

    @torch.no_grad()
    def leave(self) -> None:
        super().leave()
        for name, value in self.teacher.items():
            self.parameters[name].copy_(value)

    def release(self) -> None:
        super().release()
        self.teacher = {}
