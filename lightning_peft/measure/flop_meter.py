"""The floating point operations of a training so far, measured on a few of its own batches."""

from __future__ import annotations

import hashlib
import math
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_peft.measure.flop_count import FlopCount
from lightning_peft.network.batches import tensors_of
from lightning_peft.network.compiled import is_compiled

FLOPS, SECONDS = "peft/flops", "peft/seconds"  # what a training has cost, in the row of its validation metrics


class FlopMeter(Callback):
    """Adds up the training FLOPs of this process, and logs them as ``peft/flops`` beside the validation metrics.

    Forward and backward of a batch are counted while it trains: nothing is run twice and nothing is drawn. Batches of a shape
    that was counted cost the same again, until parameters change their shape, number or ``requires_grad``.
    Matrix products, convolutions and attention are counted, a multiplication and an addition as two. As usual, elementwise work
    and the optimizer are not, attention and weights under a mask count as full, and recomputed activations count again.

    Three things are approximate. After :attr:`shapes` shapes of a batch, a new one is scaled by its number of elements from
    the nearest that was counted. Work that comes and goes without a change of shape (gates, a generator trained every fifth
    batch) costs what it did in the batch that was counted. Of several closures a step (LBFGS), the first is counted.

    A compiled module is left alone, since counting would run a batch of it uncompiled: there is a warning, and no count.

    Put it after callbacks that change the network at the start of a batch; before them, that one batch costs as the last.

    Args:
        shapes: Shapes of a batch to count for each shape of the network.

    Example:
        >>> meter = FlopMeter()
        >>> trainer = Trainer(callbacks=[meter], logger=False, barebones=True)
        >>> meter.total
        0
    """

    def __init__(self, shapes: int = 16) -> None:
        self.shapes = shapes
        self.total = 0
        self._known: dict[str, dict[str, list[int]]] = {}  # by network, then by batch: elements and FLOPs
        self._count: FlopCount | None = None
        self._counting = ExitStack()
        self._passes = 0
        self._network: tuple[list[Any], str] = ([], "")
        self._batch: tuple[str, int] = ("", 0)
        self._silent = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count this batch if there was none like it."""
        self._count, self._passes = None, 0
        tensors = [tuple(tensor.shape) for tensor in tensors_of(batch)]
        self._batch = (str(tensors), sum(math.prod(shape) for shape in tensors))
        known = self._known.setdefault(self._name(pl_module), {})
        if self._silent or self._batch[0] in known or len(known) >= self.shapes:
            return
        if is_compiled(pl_module):
            self._silent = True
            self.total = 0
            rank_zero_warn("The training FLOPs are not counted: the module is compiled, and counting would run it uncompiled.")
            return
        self._count = self._counting.enter_context(FlopCount())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Leave out the optimizer, and count how often it asks for the loss."""
        if pl_module.automatic_optimization:
            self._counting.close()
            self._passes += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add what this batch cost."""
        self._counting.close()
        if self._silent:
            return
        (shape, elements), known = self._batch, self._known[self._network[1]]
        if self._count is None:
            flops = known[shape][1] if shape in known else self._scaled(elements, known)
        else:
            flops = self._count.total
            if outputs or not pl_module.automatic_optimization:  # else the step returned None, and there was no backward
                known[shape] = [elements, flops]
            if self._count.unknown:
                rank_zero_warn(f"The training FLOPs are counted without {', '.join(sorted(self._count.unknown))}.")
        self.total += flops * max(1, self._passes)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was spent until here, in the row of the validation metrics."""
        if in_training(trainer) and self.total:
            pl_module.log(FLOPS, float(self.total), sync_dist=True)  # the mean over processes, which train alike

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting, should the module have skipped the rest of the epoch."""
        self._counting.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        self._counting.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the sum, and what was counted: a resumed run scales from the same batches."""
        return {"total": self.total, "known": {network: dict(batches) for network, batches in self._known.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.total = int(state_dict["total"])
        self._known = {network: dict(batches) for network, batches in state_dict["known"].items()}

    def _name(self, module: nn.Module) -> str:
        """Return a name for the shapes of a network; they rarely change, so they are compared before they are hashed."""
        shapes, name = self._network
        now = [(parameter.shape, parameter.requires_grad) for parameter in module.parameters()]
        if now != shapes or not name:
            name = hashlib.sha256(str([(tuple(shape), trained) for shape, trained in now]).encode()).hexdigest()[:16]
            self._network = (now, name)
        return name

    @staticmethod
    def _scaled(elements: int, known: dict[str, list[int]]) -> int:
        near, flops = min(known.values(), key=lambda entry: abs(entry[0] - elements), default=(1, 0))
        return round(flops * elements / max(near, 1))


def in_training(trainer: Trainer) -> bool:
    """Whether a validation is part of a training: neither the sanity check nor ``Trainer.validate``."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
