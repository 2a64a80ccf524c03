"""The run: what a method may know of the training it takes part in."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft.attach.sampling import SampleRecorder
from lightning_peft.structure.schedulers import FreshSchedule


@dataclass(slots=True)
class Run:
    """One ``fit``, ``validate``, ``test`` or ``predict`` call.

    Attributes:
        trainer: The Trainer.
        module: The user's LightningModule.
        network_name: Qualified name of the network inside it (``""`` for the module itself).
        network: The network.
        step: Optimizer steps of the first optimizer so far: the one clock of all schedules. ``trainer.global_step`` counts
            the steps of every optimizer under manual optimization, so it is no clock.
        samples: Follows the training loader when a method reads the sample index.
        started: Whether the methods are started, so that their state is in force.
        schedules: Learning-rate schedulers as they began, for methods that let them begin again.
        in_step: Whether the user's ``training_step`` runs now.
        late_epoch: Set while an epoch that ended before the checkpoint is ended for the methods.
    """

    trainer: Trainer
    module: LightningModule
    network_name: str
    network: nn.Module
    step: int = 0
    samples: SampleRecorder | None = None
    started: bool = False
    in_step: bool = False
    late_epoch: int | None = None
    schedules: list[FreshSchedule] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Epoch being trained, from 0."""
        return self.trainer.current_epoch if self.late_epoch is None else self.late_epoch

    @property
    def total_epochs(self) -> int:
        """Epochs this fit will run in all.

        Raises:
            MisconfigurationException: The Trainer has no end.
        """
        if self.trainer.max_epochs is not None and self.trainer.max_epochs > 0:
            return self.trainer.max_epochs
        return -(-self.total_steps // self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        batches = int(self.trainer.num_training_batches)
        return max(1, -(-batches // self.trainer.accumulate_grad_batches))

    @property
    def total_steps(self) -> int:
        """Optimizer steps this fit will take in all.

        Raises:
            MisconfigurationException: The Trainer has no end, so a fraction of the training means nothing.
        """
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise MisconfigurationException(
                "A schedule is given as a fraction of the training, but the Trainer has no end: set max_epochs or max_steps, "
                "or give the schedule in optimizer steps."
            )
        return int(total)
