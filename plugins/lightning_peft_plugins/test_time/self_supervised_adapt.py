"""Test-time training on a loss of the module's own that needs no label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft.capture.once_more import silent
from lightning_peft.network.batches import batch_size, detached, join, plain, tensors_of
from lightning_peft.network.targets import TargetSpec
from lightning_peft.registry import suggest
from lightning_peft_plugins.test_time._shared.descent import DescentMethod
from lightning_peft_plugins.test_time._shared.stream import Reset

Objective = Callable[[LightningModule, Any], Tensor]
BATCH = "_lightning_peft_batch"


class SelfSupervisedAdapt(DescentMethod):
    """Takes gradient steps on a label-free loss of the module's own for every batch, then answers the network's call.

    For whatever the module predicts: classes, poses, numbers, restored images. The loss is computed from the batch as the
    module's own step is given it, whatever its structure; the batch is adapted to when the step first calls the network, and
    what the step sees are predictions after that (test-time training, Sun et al.).

    Args:
        objective: Name of a method of the module that takes a batch, or a function ``(module, batch)``; returns a scalar loss.
        lr: Learning rate.
        momentum: Momentum of an optimizer that has one.
        steps: Updates for each batch, or sample.
        statistics: ``"source"``: BatchNorm layers normalise with running statistics; ``"batch"``: with those of the batch.
        reset: ``"never"``, at every new ``"dataloader"``, before every ``"batch"`` or ``"sample"``, or before the batch that
            follows so many updates. With ``"sample"`` the samples of a batch are adapted to one by one.
        targets: Layers whose parameters move; ``None`` is the whole module.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.descent.DescentMethod`.

    Raises:
        MisconfigurationException: The module has no such method, or it returns no scalar that depends on what moves.

    Example:
        >>> SelfSupervisedAdapt("rotation_loss", steps=10, reset="sample").objective
        'rotation_loss'
    """

    paper = (
        "Sun et al.: Test-Time Training with Self-Supervision for Generalization under Distribution Shifts, ICML 2020, "
        "https://arxiv.org/abs/1909.13231"
    )

    def __init__(
        self,
        objective: str | Objective,
        *,
        lr: float = 1e-3,
        momentum: float = 0.0,
        statistics: Literal["batch", "source"] = "source",
        reset: Reset | Literal["sample"] = "never",
        targets: TargetSpec | None = None,
        **kwargs: Any,
    ) -> None:
        alone = reset == "sample"
        passed: Any = "never" if alone else reset
        super().__init__(lr=lr, momentum=momentum, statistics=statistics, reset=passed, targets=targets, **kwargs)
        if self.keep and alone:
            raise MisconfigurationException(
                f'{self.name} with reset="sample" returns to the source after every sample, so there is nothing to keep. Leave '
                'keep=True out, or take reset="never".'
            )
        self.objective, self.alone = objective, alone

    def adapt_start(self, run: Run) -> None:
        super().adapt_start(run)
        self._done: tuple[int, int] | None = None
        if isinstance(self.objective, str) and not callable(getattr(run.module, self.objective, None)):
            own = [name for name in vars(type(run.module)) if not name.startswith("_")]
            raise MisconfigurationException(
                f"{self.name}: {type(run.module).__name__} has no method {self.objective!r}.{suggest(self.objective, own)} "
                "Write one that takes a batch and returns a scalar loss, or pass a function of module and batch."
            )

    def adapt(self, call: Call) -> Any:
        place = (call.dataloader_idx, call.batch_idx)
        if self._done == place:  # the step calls its network again, for a batch that was adapted to
            if self.alone:
                raise MisconfigurationException(
                    f'{self.name} with reset="sample" answers each sample by its own weights, but this step calls the network '
                    'more than once for a batch. Take reset="batch" and a batch size of 1.'
                )
            return call()
        batch = apply_to_collection(call.batch, Tensor, plain)
        if self.alone and batch_size(batch) != call.size:
            raise MisconfigurationException(
                f'{self.name} with reset="sample" takes samples out of the batch, but of a batch of {batch_size(batch)} the '
                f'network is given {call.size}. Take reset="batch" and a batch size of 1.'
            )
        together = replace(call, forward=partial(_without_batch, call.forward), kwargs={**call.kwargs, BATCH: batch})
        answer = super().adapt(together)
        self._done = place
        return answer

    def update(self, call: Call) -> Any:
        if not self.alone:
            return self._adapted(call)
        outputs = []
        for index in range(call.size):
            self.to_source()
            outputs.append(detached(self._adapted(call.take(slice(index, index + 1)))))
        return join(outputs, [1] * call.size)

    def _adapted(self, call: Call) -> Any:
        for _ in range(self.steps_per_batch):
            self.descend(call)
        with self.predicting():
            return call()

    def descend(self, call: Call) -> None:
        assert self.run is not None
        try:
            with torch.enable_grad(), silent(self.run.module):
                loss = self._loss(self.run.module, call.kwargs[BATCH])
            loss.backward()
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
            raise MisconfigurationException(
                f"{self.name}: the batch holds tensors where they cannot be reached ({type(call.kwargs[BATCH]).__name__}), and "
                "they were made in inference mode, which takes no gradient. Evaluate with Trainer(inference_mode=False)."
            ) from error
        self.note(loss=float(loss))
        self.step(call.size)

    def _loss(self, module: LightningModule, batch: Any) -> Tensor:
        loss = getattr(module, self.objective)(batch) if isinstance(self.objective, str) else self.objective(module, batch)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
            given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            moved = "" if not isinstance(loss, Tensor) or loss.ndim else " that no parameter which moves has a part in"
            raise MisconfigurationException(
                f"{self.name}: the objective must return a scalar loss of the parameters that move, and returned {given}"
                f"{moved}. Take the mean, compute it with gradients, and choose targets= that it depends on."
            )
        return loss

    def logits(self, output: Any) -> Tensor:
        """All numbers of an output, sample by sample; only asked whether they are finite."""
        found = [t.flatten(1) if t.ndim > 1 else t[:, None] for t in tensors_of(output) if t.ndim and t.is_floating_point()]
        size = len(found[0]) if found else 0
        return torch.cat([part for part in found if len(part) == size], 1) if found else torch.zeros(0, 1)


def _without_batch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The batch travels with the call, so that samples taken out of one are taken out of both."""
    kwargs.pop(BATCH)
    return forward(*args, **kwargs)
