"""The record of one episode: errors, calibration, passes through the network, time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_peft.atomic_files import whole
from lightning_peft.attaching.hub import passes_of
from lightning_peft.measure.confidence import ConfidenceRecorder, reliability_bins
from lightning_peft.shifts.data import CLEAN
from lightning_peft.shifts.streams import Episode

POINTS = 120  # of the curve over the stream


@dataclass(frozen=True)
class PartRecord:
    """Results on the samples of one test set within an episode.

    Attributes:
        part: Its name.
        samples: How many came.
        error: Share that was classified wrongly.
        ece: Expected calibration error, 15 bins (Guo et al., ICML 2017).
    """

    part: str
    samples: int
    error: float
    ece: float


@dataclass(frozen=True)
class EpisodeRecord:
    """Results of one method on one episode.

    Attributes:
        method: Name of the method, ``"source"`` for none.
        protocol: Protocol.
        seed: Seed of the order.
        episode: Name of the episode.
        stream: Digest of the episode.
        parts: Results on each shifted test set.
        clean: Results on the clean samples after them.
        curve: Places in the stream (samples seen) and error in the samples around each.
        borders: Samples seen at the end of each segment.
        forward: Samples of all forward passes.
        backward: Samples in forward passes that were backpropagated through.
        seconds: Wall time of the evaluation loop.
        made_with: Digest of the source model, data, recipe and versions it was made with; empty where nobody said.
        calibration: Calibration of all answers under shift by each estimator, as they are and with a fitted temperature; empty
            in records of earlier versions, and where the logits were too many to keep.
    """

    method: str
    protocol: str
    seed: int
    episode: str
    stream: str
    parts: list[PartRecord]
    clean: PartRecord | None
    curve: tuple[list[float], list[float]]
    borders: list[int]
    forward: int
    backward: int
    seconds: float
    made_with: str = ""
    calibration: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Samples in the episode, clean ones included."""
        return sum(part.samples for part in (*self.parts, *([self.clean] if self.clean else [])))

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> EpisodeRecord:
        """Read what :meth:`write` wrote."""
        found = json.loads(path.read_text())
        found["parts"] = [PartRecord(**part) for part in found["parts"]]
        found["clean"] = PartRecord(**found["clean"]) if found["clean"] else None
        found["curve"] = tuple(found["curve"])
        found["calibration"] = {name: tuple(pair) for name, pair in found.get("calibration", {}).items()}
        return cls(**found)


class StreamRecorder(ConfidenceRecorder):
    """Records a ``trainer.test`` on the loader of an episode; leave a Trainer's other callbacks as they are.

    It holds the logits of this one episode until :meth:`record` has judged them; the record has none. Where they are more than
    :data:`~lightning_peft.measure.confidence.MOST` numbers it lets go of them, and the record is without ``calibration``.

    Args:
        advance: Called after every batch with the number of its samples, for a progress bar.
    """

    def __init__(self, advance: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self._advance = advance
        self.forward = self.backward = 0
        self.seconds = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_test_start(trainer, pl_module)
        self._start = time.perf_counter()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take logits and labels of this batch."""
        before = len(self.correct)
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._advance is not None:
            self._advance(len(self.correct) - before)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self._start
        passes = passes_of(pl_module)
        # Without a method that adapts nobody counts, and every sample goes forward once.
        self.forward, self.backward = (len(self.correct), 0) if passes is None else (passes.forward, passes.backward)
        super().on_test_end(trainer, pl_module)

    def record(self, episode: Episode, method: str, protocol: str, seed: int) -> EpisodeRecord:
        """Summarise what was recorded.

        Raises:
            MisconfigurationException: Predictions or labels of some samples could not be told.
        """
        order = episode.order()
        if len(self.correct) != len(order):
            raise MisconfigurationException(
                f"Predictions of {len(self.correct)} of {len(order)} samples were seen. The test step must call the network "
                "once with each batch of (inputs, labels), or of a mapping with 'labels', and get logits (samples, classes)."
            )
        confidence, correct = torch.tensor(self.confidence), torch.tensor(self.correct)
        parts = [
            _part(str(part), confidence[order[:, 0] == index], correct[order[:, 0] == index])
            for index, part in enumerate(episode.parts)
        ]
        ends_clean = episode.parts[-1] == CLEAN
        shifted = order[:, 0] != len(episode.parts) - 1 if ends_clean else None
        return EpisodeRecord(
            method=method,
            protocol=protocol,
            seed=seed,
            episode=episode.name,
            stream=episode.digest(),
            parts=parts[:-1] if ends_clean else parts,
            clean=parts[-1] if ends_clean else None,
            curve=_curve(correct),
            borders=torch.tensor([len(segment) for segment in episode.segments]).cumsum(0).tolist(),
            forward=self.forward,
            backward=self.backward,
            seconds=self.seconds,
            calibration=self.table(shifted),
        )


def _part(name: str, confidence: Tensor, correct: Tensor) -> PartRecord:
    bins = reliability_bins(confidence.tolist(), correct.tolist())
    ece = sum(share * abs(accuracy - sure) for sure, accuracy, share in bins)
    return PartRecord(name, len(correct), 1 - float(correct.float().mean()), ece)


def _curve(correct: Tensor) -> tuple[list[float], list[float]]:
    pieces = correct.tensor_split(min(POINTS, max(1, len(correct) // 10)))
    seen = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    places = [float(end) - len(piece) / 2 for end, piece in zip(seen, pieces, strict=True)]
    return places, [round(1 - float(piece.float().mean()), 6) for piece in pieces]
