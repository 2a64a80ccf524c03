"""SaRA: training of the weights that are so small that they hardly count."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_peft import Run, Step
from lightning_peft.attaching.averaging import averaged_modules
from lightning_peft.compose.schedule import parse_point
from lightning_peft.network.targets import TargetSpec
from lightning_peft.weights.shards import read_whole
from lightning_peft_plugins.selective._sara.small_values import SmallValues
from lightning_peft_plugins.selective._shared.roomy_values import RoomyValues
from lightning_peft_plugins.selective._shared.sparse_update import SparseUpdate
from lightning_peft_plugins.selective.functional.sara import nuclear_norm


class SaRA(SparseUpdate):
    """Trains the entries of weights that are below a threshold in magnitude, and holds the matrix they make at a low rank.

    The loss gains the nuclear norm of one weight at its trained entries, another weight by chance in every step. At
    ``reselect`` entries that have grown to the threshold are frozen as they are; the others go on, with an optimizer that
    begins anew.

    Args:
        threshold: Entries with a magnitude below it are trained.
        nuclear: Factor of the nuclear norm; 0 leaves it out.
        reselect: When entries that have grown are frozen: an optimizer step, ``"50%"`` or ``"2ep"``; ``None`` for never.
        seed: What the weight of a step is drawn with.
        tune: Which parameters are trained as they are: ``"bias"``, ``"norm"``, ``"head"`` (the layers that write the logits).
        targets: Layers whose weights are trained.
        exclude: Layers whose weights are not.
        checkpoint: ``"trained"`` leaves what did not change out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: A threshold that is not above 0 or that no entry is below, or a negative factor.

    Example:
        >>> SaRA(threshold=1e-3)
        SaRA(threshold=0.001, nuclear=0.0005, reselect='50%', seed=0, tune=(), targets='auto', exclude=('head',), ...)
    """

    weight_maps = (SmallValues,)
    paper = (
        "Hu et al., SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation, ICLR 2025, "
        "arXiv 2409.06633"
    )

    def __init__(
        self,
        threshold: float = 2e-3,
        nuclear: float = 5e-4,
        reselect: float | str | None = "50%",
        seed: int = 0,
        tune: Collection[str] = (),
        targets: TargetSpec = "auto",
        exclude: TargetSpec | None = ("head",),
        *,
        checkpoint: Literal["full", "trained"] = "trained",
        name: str | None = None,
    ) -> None:
        super().__init__(tune, targets, exclude, checkpoint=checkpoint, name=name or "sara")
        if threshold <= 0:
            raise MisconfigurationException(f"threshold={threshold} must be above 0, or no entry is below it.")
        if nuclear < 0:
            raise MisconfigurationException(f"nuclear={nuclear} would raise the rank; use 0 or more.")
        self.threshold, self.nuclear, self.seed = threshold, nuclear, seed
        self.reselect = None if reselect is None else parse_point(reselect)
        self._selected_at = 0

    def count(self, weight: Tensor) -> int:
        """As many as are small."""
        return len(self.first("", weight))

    def first(self, tensor: str, weight: Tensor) -> Tensor:
        """The small entries."""
        return (weight.detach().flatten().abs() < self.threshold).nonzero().flatten()

    def values(self, weight: Tensor, indices: Tensor | int) -> SmallValues:
        """Values with as much room as there are small entries."""
        if isinstance(indices, int):
            return SmallValues(weight.numel(), indices)
        return SmallValues(weight.numel(), len(indices), indices)

    def attach(self, module: LightningModule) -> None:
        """Put values on the weights, all zero.

        Raises:
            MisconfigurationException: No entry is small.
        """
        weights = {name: module.get_submodule(name.rpartition(".")[0]).weight.detach() for name in self.claims(module)}  # type: ignore[operator]
        if self.fits and not any(self.count(weight) for weight in weights.values()):
            tenth = torch.cat([weight.flatten().abs().cpu() for weight in weights.values()]).float()
            tenth = tenth.kthvalue(max(1, len(tenth) // 10)).values
            raise MisconfigurationException(
                f"{self.name}: no entry of its {len(weights)} weights is below threshold={self.threshold}. A tenth of them is "
                f"below threshold={float(tenth):.2g}."
            )
        super().attach(module)

    def start(self, run: Run) -> None:
        """Know where the training stands: a file holds the state after its step."""
        self._selected_at = run.step

    def loss(self, step: Step) -> Tensor | None:
        found = [pair for pair in self.maps(step.run.module) if len(pair[1].indices)]
        if not self.nuclear or not found:
            return None
        mapped, values = found[zlib.crc32(f"{self.seed}/{step.run.step}".encode()) % len(found)]
        with read_whole(values):
            trained = values.values[: len(values.indices)]
        norm = nuclear_norm(mapped.entering(values), values.indices, trained)
        return self.nuclear * norm

    def after_step(self, run: Run) -> None:
        """Freeze what has grown, when it is time to."""
        if self.reselect is None or run.step == self._selected_at or run.step != run.place(self.reselect, "reselect="):
            return
        self._selected_at = run.step
        still: dict[str, Tensor] = {}
        for mapped, values in self.maps(run.module):
            small = mapped.leaving(values).flatten()[values.indices].abs() < self.threshold
            still[mapped.name] = values.indices[small]
            for optimizer in run.trainer.optimizers:
                optimizer.state.pop(values.values, None)
        for module in (run.module, *averaged_modules(run.trainer)):
            for mapped, values in self.maps(module):
                assert isinstance(values, RoomyValues)
                self.fold(mapped, values)
                values.choose(still[mapped.name])

    def awaited(self, run: Run) -> Iterable[str]:
        """The freezing of what has grown."""
        if self.reselect is not None and run.step < (place := run.place(self.reselect, "reselect=")):
            yield f"entries were selected anew, after step {place}; reselect=None asks for that never to be"
