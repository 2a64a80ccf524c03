"""The run: what a method may know of the training it takes part in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.optim import Optimizer

from lightning_peft.capture.sampling import SampleRecorder
from lightning_peft.compose.course import Course
from lightning_peft.compose.schedule import Point, ResolvedSchedule, Schedule, parse_point
from lightning_peft.namespaces import both
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.optim.schedulers import FreshSchedule
from lightning_peft.optim.wrapped import innermost


@dataclass(slots=True)
class Run:
    """One ``fit``, ``validate``, ``test`` or ``predict`` call.

    How long a training is, is found out when it is asked for, and no more of it than is needed: a stream has no epoch with a
    length, and a training may have no end, which is no matter for what is given in optimizer steps.

    Attributes:
        trainer: The Trainer.
        module: The user's LightningModule.
        network_name: Qualified name of the network inside it (``""`` for the module itself).
        network: The network.
        step: Optimizer steps of the first optimizer so far: the one clock of all schedules. ``trainer.global_step`` counts
            the steps of every optimizer under manual optimization, so it is no clock.
        samples: Follows the training loader when a method reads the sample index.
        started: Whether the methods are started, so that their state is in force.
        batch: The batch at hand and its number, while a method may change the structure between two steps.
        schedules: Learning-rate schedulers as they began, for methods that let them begin again.
        in_step: Whether the user's ``training_step`` runs now.
        repeated: Whether it runs once more for a batch that this optimizer step has seen: nobody is to remember anything of it.
        late_epoch: Set while an epoch that ended before the checkpoint is ended for the methods.
        frozen: Parameters that are frozen for this fit, because no method names them as trained.
        asked_total: Whether a method has asked for the end of this training.
        asked_epoch: Whether a method has asked for the length of an epoch.
    """

    trainer: Trainer
    module: LightningModule
    network_name: str
    network: nn.Module
    step: int = 0
    samples: SampleRecorder | None = None
    started: bool = False
    batch: tuple[Any, int] | None = None
    in_step: bool = False
    repeated: bool = False
    late_epoch: int | None = None
    schedules: list[FreshSchedule] = field(default_factory=list)
    frozen: set[nn.Parameter] = field(default_factory=set)
    asked_total: bool = False
    asked_epoch: bool = False

    @property
    def epoch(self) -> int:
        """Epoch being trained, from 0."""
        return self.trainer.current_epoch if self.late_epoch is None else self.late_epoch

    @property
    def gradient_scaler(self) -> Any:
        """The scaler of ``16-mixed``, or ``None``."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def gradient_scale(self, optimizer: Optimizer) -> float:
        """Factor by which gradients are too large between the backward passes and the step: 1, unless one unscales by itself.

        An optimizer with ``fused=True`` under a gradient scaler does; what is added to its gradients is to be multiplied.
        """
        scaler = self.gradient_scaler
        unscales = getattr(innermost(optimizer), "_step_supports_amp_scaling", False)
        return float(scaler.get_scale()) if scaler is not None and unscales else 1.0

    def skips(self, optimizer: Optimizer) -> bool:
        """Whether a gradient scaler is about to skip a step, because a gradient is not finite; to be asked before it clips."""
        if self.gradient_scaler is None:
            return False
        gradients = [parameter.grad for parameter in trained_by(optimizer) if parameter.grad is not None]
        return not bool(torch.nn.utils.get_total_norm(gradients, math.inf).isfinite())

    def place(self, point: Point, argument: str = "A schedule point") -> int:
        """Convert a point of training to optimizer steps.

        Args:
            point: The point.
            argument: Where the user gave it, ``"every="``, for the message.

        Raises:
            MisconfigurationException: It is a fraction and this training has no known end, or it is in epochs and they have no
                known length. The message names the cure.
        """
        self.asked_total |= point.unit == "fraction"
        self.asked_epoch |= point.unit == "epoch"
        if point.unit == "step":
            return round(point.amount)
        return self._course(epoch=point.unit == "epoch").place(point, argument)

    def resolve(self, schedule: Schedule) -> ResolvedSchedule:
        """Tie a schedule to this training.

        Raises:
            MisconfigurationException: As for :meth:`place`, or it ends before it starts.
        """
        start, end = (self.place(parse_point(getattr(schedule, name)), f"{name}=") for name in ("start", "end"))
        return schedule.between(start, end)

    def place_from_end(self, point: Point, argument: str = "A schedule point") -> int:
        """Convert a length before the end of training to the optimizer step at which it begins; see :meth:`place`."""
        self.asked_total = True
        return self._course(epoch=point.unit == "epoch").place_from_end(point, argument)

    @property
    def end(self) -> int | None:
        """Optimizer steps this fit will take in all; ``None`` when it has no end, or none that is known beforehand."""
        return None if self._max_epochs is None and self._max_steps is None else self._course().total

    @property
    def total_steps(self) -> int:
        """Optimizer steps this fit will take in all.

        Raises:
            MisconfigurationException: That is not known.
        """
        self.asked_total = True
        return self._course().require_total()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch; other epochs may have others, see :meth:`place`.

        Raises:
            MisconfigurationException: That is not known.
        """
        return self.place(Point(1, "epoch"))

    @property
    def total_epochs(self) -> int:
        """Epochs this fit will run in all.

        Raises:
            MisconfigurationException: That is not known.
        """
        epochs = self._max_epochs
        # Under manual optimization a number of steps says nothing about epochs.
        if epochs is not None and (self._max_steps is None or not self.module.automatic_optimization):
            return epochs
        return self._course(epoch=True).require_epochs()

    def _course(self, *, epoch: bool = False) -> Course:
        """The limits of this fit, with the length of an epoch if the end depends on it or ``epoch`` is asked for."""
        by_steps_alone = self._max_epochs is None and self._max_steps is not None
        batches = None if by_steps_alone and not epoch else self._batches()
        return Course(batches, self._max_epochs, self._max_steps, self._accumulation())

    def _batches(self) -> int | None:
        """Batches of an epoch; ``None`` for a stream without a length."""
        loop = self.trainer.fit_loop
        if self.trainer.limit_train_batches == 0:
            return 0
        if loop._combined_loader is None:  # during the sanity check Lightning has not come to the training loader yet
            loop.setup_data()
        return None if loop.max_batches == float("inf") else int(loop.max_batches)

    @property
    def _max_epochs(self) -> int | None:
        epochs = self.trainer.max_epochs
        return None if epochs is None or epochs < 0 else max(1, epochs)

    @property
    def _max_steps(self) -> int | None:
        """Steps of the first optimizer that ``Trainer(max_steps=...)`` allows, of all optimizers in manual optimization."""
        steps = self.trainer.max_steps
        return None if steps < 0 else max(1, steps // self.optimizers)

    @property
    def optimizers(self) -> int:
        """Optimizers whose steps ``Trainer(max_steps=...)`` counts."""
        return 1 if self.module.automatic_optimization else max(1, len(self.trainer.optimizers))

    def _accumulation(self) -> Mapping[int, int]:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        by_epoch = [entry for entry in callbacks if isinstance(entry, both(GradientAccumulationScheduler))]
        return by_epoch[-1].scheduling if by_epoch else {0: self.trainer.accumulate_grad_batches}
