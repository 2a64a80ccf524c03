"""RoTTA: robust statistics, a balanced memory, and a slow teacher, for streams whose labels come in runs."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_peft import Run
from lightning_peft.arguments import positive
from lightning_peft.capture.evaluation import Call
from lightning_peft.network.called_with import call_with
from lightning_peft.network.logits import with_logits
from lightning_peft_plugins.test_time._rotta.sample_memory import SampleMemory
from lightning_peft_plugins.test_time._shared.batch_statistics import RobustStatistics, batch_norms
from lightning_peft_plugins.test_time._shared.descent import fine_copy
from lightning_peft_plugins.test_time._shared.finite_samples import finite_rows
from lightning_peft_plugins.test_time._shared.views import ViewMethod
from lightning_peft_plugins.test_time.functional.predictions import symmetric_cross_entropy


class RoTTA(ViewMethod):
    """Learns from a memory balanced over predicted classes, with statistics that move slowly, and predicts with a teacher.

    Every ``every`` samples the network, on random views of what is in memory, learns from its own moving average on the same
    samples; fresh samples count more. BatchNorm layers normalise with running statistics, which each update moves a little.

    Args:
        capacity: Samples in memory.
        every: Samples between updates.
        statistics_momentum: How far an update moves the running statistics.
        teacher_momentum: Share of the network that goes into the teacher at an update.
        timeliness: Weight of the age in the memory's score.
        uncertainty: Weight of the entropy in the memory's score.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.views.ViewMethod`.

    Example:
        >>> RoTTA(capacity=32, every=32).every
        32
    """

    paper = "Yuan, Xie, Li: Robust Test-Time Adaptation in Dynamic Scenarios, CVPR 2023, https://arxiv.org/abs/2303.13899"

    def __init__(
        self,
        *,
        lr: float = 1e-3,
        optimizer: Any = "Adam",
        capacity: int = 64,
        every: int = 64,
        statistics_momentum: float = 0.05,
        teacher_momentum: float = 0.001,
        timeliness: float = 1.0,
        uncertainty: float = 1.0,
        statistics: Literal["source"] = "source",
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, optimizer=optimizer, statistics=statistics, **kwargs)
        positive("capacity", capacity)
        positive("every", every)
        self.capacity, self.every = capacity, every
        self.statistics_momentum, self.teacher_momentum = statistics_momentum, teacher_momentum
        self.timeliness, self.uncertainty = timeliness, uncertainty
        self._robust = RobustStatistics((), 0.0)
        self.teacher: dict[str, Tensor] = {}

    def adapt_start(self, run: Run) -> None:
        self._robust = RobustStatistics(batch_norms(run.network).values(), self.statistics_momentum)
        self._network = run.network
        super().adapt_start(run)

    def descend(self, call: Call) -> Any:
        output = self._teach(call)
        logits = self.logits(output)
        self.one_a_sample(logits, call.size, "its memory holds samples by their class")
        p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # 1e-6 is nothing beside a half
        unsure = -(p * (p + 1e-6).log()).sum(-1)
        if self._memory is None:
            self._memory = SampleMemory(self.capacity, logits.shape[-1], self.timeliness, self.uncertainty)
        for index, (label, uncertainty) in enumerate(zip(p.argmax(-1).tolist(), unsure.tolist(), strict=True)):
            if not math.isfinite(uncertainty):
                continue
            self._memory.add(label, call.take(slice(index, index + 1)), uncertainty)
            self._count += 1
            if self._count % self.every == 0:
                self._learn()
        return with_logits(output, logits)

    def _learn(self) -> None:
        assert self._memory is not None
        kept = self._memory.kept()
        if not kept:
            return
        call = Call.gather([item.sample for item in kept])
        ages = torch.tensor([item.age / self.capacity for item in kept], dtype=torch.float32)
        with self._robust.moving():
            target = self.logits(self._teach(call))
            with torch.enable_grad():
                logits = self.logits(call.with_inputs(self.augment)())
        finite = finite_rows(logits.detach()) & finite_rows(target)
        if not bool(finite.all()):  # what the network makes nothing of any more would spoil every update to come
            self._memory.keep(finite.tolist())
            return
        with torch.enable_grad():
            weights = (-ages).sigmoid().to(logits.device)
            loss = (symmetric_cross_entropy(logits, target, alpha=0.0) * weights).mean()
        loss.backward()
        self.note(selected=len(kept) / self.capacity, loss=float(loss))
        self.step(len(kept))
        with torch.no_grad():
            for name, parameter in self._network.named_parameters():
                teacher = self.teacher[name]
                teacher.lerp_(parameter.to(teacher.dtype), self.teacher_momentum)

    def _teach(self, call: Call) -> Any:
        own = dict(self._network.named_parameters())
        state = {name: value.to(own[name].dtype) if name in own else value for name, value in self.teacher.items()}
        return call_with(self._network, state, call.args, call.kwargs)

    def forget(self) -> None:
        self._memory: SampleMemory | None = None
        self._count = 0
        self._robust.reset()
        super().forget()
        if self.parameters:
            buffers = {name: value.detach().clone() for name, value in self._network.named_buffers()}  # these move in place
            self.teacher = {**fine_copy(dict(self._network.named_parameters())), **buffers}

    @torch.no_grad()
    def leave(self) -> None:
        super().leave()
        state = {**dict(self._network.named_parameters()), **dict(self._network.named_buffers())}
        for name, value in self.teacher.items():
            state[name].copy_(value)

    def release(self) -> None:
        super().release()
        self._robust.restore()
        self.teacher, self._memory = {}, None
