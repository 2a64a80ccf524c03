"""Predictions of one batch on their way from the device to a memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_peft_plugins.regularizers._pskd.soft_label_memory import SoftLabelMemory


@dataclass(frozen=True, slots=True)
class Prediction:
    """Class probabilities of one batch, and the event after which they have arrived in CPU memory."""

    epoch: int
    batch_idx: int
    samples: Tensor
    probabilities: Tensor
    arrival: torch.Event | None


class PredictionOutbox:
    """Holds the predictions of the batch at hand until the next one comes.

    So a step neither waits for the device nor, when it is evaluated twice, reads back what it has just written.
    """

    def __init__(self) -> None:
        self._held: Prediction | None = None

    def holds(self, epoch: int, batch_idx: int) -> bool:
        """Say whether the predictions of this batch are here already."""
        return self._held is not None and (self._held.epoch, self._held.batch_idx) == (epoch, batch_idx)

    def put(self, epoch: int, batch_idx: int, samples: Tensor, probabilities: Tensor) -> None:
        """Send predictions on their way.

        Args:
            epoch: Epoch of the batch.
            batch_idx: Its position in the epoch.
            samples: Positions in the dataset, shape ``(batch,)``, on the CPU.
            probabilities: Distributions, shape ``(batch, classes)``, on any device.
        """
        arrival = None
        if probabilities.is_cuda:
            stream = torch.cuda.current_stream(probabilities.device)
            probabilities = probabilities.to("cpu", non_blocking=True)
            arrival = stream.record_event()
        self._held = Prediction(epoch, batch_idx, samples, probabilities.cpu(), arrival)

    def deliver(self, memory: SoftLabelMemory) -> None:
        """Write what is held; by the next batch it arrived long ago, for only a forward pass lies before it on the device."""
        held, self._held = self._held, None
        if held is None:
            return
        if held.arrival is not None:
            held.arrival.synchronize()
        memory.write(held.samples, held.probabilities)

    def deliver_processed(self, memory: SoftLabelMemory, trainer: Trainer) -> None:
        """Write what is held unless its batch was interrupted: a resumed training sees that one again."""
        if self._held is None:
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        if trainer.current_epoch > self._held.epoch or progress.processed > self._held.batch_idx:
            self.deliver(memory)

    def clear(self) -> None:
        """Forget what is held."""
        self._held = None
