"""Finds out what a fit changed: every trained matrix, from its frozen weight or its value at the start, to the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_peft.measure.matrices import Matrix, matrices
from lightning_peft.measure.weight_changes import MOST_WORK, Learnt, WeightChange, weight_change, worth_decomposing
from lightning_peft.structure.journal import journal_of

MOST = 2**27
"""Numbers of starting values that are kept, smaller matrices first; 512 MiB in single precision."""


class ChangeRecorder(Callback):
    """Measures at the end of a fit how its matrices changed.

    Under a delta the weight it started from is the frozen one, which is still there. Only a weight that is trained itself, or
    has a delta that is not zero at the start, is copied, to the CPU. Where processes share the work, the first one measures,
    and the others only help to gather shards.

    Args:
        most: Numbers of starting values that are kept.
        work: See :data:`~lightning_peft.measure.weight_changes.MOST_WORK`.

    Attributes:
        learnt: What was found; empty before the end, and in all processes but the first.

    Example:
        >>> from lightning_peft.testing import Plain, loader, trainer
        >>> recorder = ChangeRecorder()
        >>> trainer(callbacks=[recorder]).fit(Plain(), loader(), loader())
        >>> [row.name for row in recorder.learnt.rows]
        ['model.0.weight', 'model.2.weight', 'model.4.weight']
    """

    def __init__(self, most: int = MOST, work: float = MOST_WORK) -> None:
        self.most, self.work = most, work
        self.learnt = Learnt()
        self._start: dict[str, Tensor] = {}
        self._moving: set[str] = set()
        self._edits = 0
        self._resumed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy what nothing else will remember; methods have started."""
        self.learnt, self._start, self._resumed = Learnt(), {}, trainer.global_step > 0
        if self._resumed:
            return
        moving = [
            matrix
            for matrix in matrices(pl_module)
            if matrix.stored.requires_grad or (matrix.has_delta and not _same(matrix.base(), matrix.seen()))
        ]
        self._moving, self._edits, room = {matrix.name for matrix in moving}, len(journal_of(pl_module)), self.most
        for matrix in sorted(moving, key=lambda matrix: matrix.stored.numel()):
            room -= matrix.stored.numel()
            if room >= 0:
                value = matrix.seen() if trainer.is_global_zero else matrix.seen()[:0]
                self._start[matrix.name] = value.to("cpu", matrix.stored.dtype, copy=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, while deltas are still on the module."""
        begun = time.perf_counter()
        if len(journal_of(pl_module)) != self._edits:
            note = "The structure of the network was edited in training: there is nothing to compare its matrices with."
            self.learnt, self._start = Learnt(notes=(note,)), {}
            return
        trained = [matrix for matrix in matrices(pl_module) if matrix.stored.requires_grad or matrix.has_delta]
        lost: dict[str, list[str]] = {}
        for matrix in trained:
            if matrix.name not in self._start and (matrix.stored.requires_grad or matrix.name in self._moving):
                lost.setdefault(self._why_lost(matrix), []).append(matrix.name)
        missing = {name for names in lost.values() for name in names}
        known = [matrix for matrix in trained if matrix.name not in missing]
        if not trainer.is_global_zero:
            for matrix in known:
                self._before_and_after(matrix)
            self._start = {}
            return
        rows, notes = self._measured(known)
        notes += [f"What {_listed(names)} held when the training began is not known: {why}." for why, names in lost.items()]
        self.learnt, self._start = Learnt(tuple(rows), tuple(notes), time.perf_counter() - begun), {}

    def _why_lost(self, matrix: Matrix) -> str:
        if self._resumed:
            return "the run was resumed"
        return f"more than {self.most:,} numbers are not kept" if matrix.name in self._moving else "it was frozen then"

    def _measured(self, known: Sequence[Matrix]) -> tuple[list[WeightChange], list[str]]:
        shapes = [
            tuple(part.shape) for matrix in known for _, part in matrix.split(torch.empty(matrix.stored.shape, device="meta"))
        ]
        wanted = worth_decomposing(shapes, self.work)  # type: ignore[arg-type]
        rows: list[WeightChange] = []
        for matrix in known:
            before, after = self._before_and_after(matrix)
            for (name, old), (_, new) in zip(matrix.split(before), matrix.split(after), strict=True):
                rows.append(weight_change(name, old.cpu(), new.cpu(), decompose=wanted[len(rows)]))
        if all(wanted):
            return rows, []
        chosen = f"{sum(wanted)} of the {len(rows)} matrices, spread over the network"
        return rows, [f"Ranks and intruders are those of {chosen}: those of all would take more than {self.work:.0e} products."]

    def _before_and_after(self, matrix: Matrix) -> tuple[Tensor, Tensor]:
        start = self._start.get(matrix.name)
        return matrix.base() if start is None else start, matrix.seen()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to know of the start."""
        return {"moving": sorted(self._moving), "edits": self._edits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take that back."""
        self._moving, self._edits = set(state_dict["moving"]), int(state_dict["edits"])


def _same(base: Tensor, seen: Tensor) -> bool:
    """Whether a delta is zero, but for rounding."""
    return bool(torch.allclose(base.to(seen.dtype), seen, rtol=1e-5, atol=0))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
