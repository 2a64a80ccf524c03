"""Training of principal weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft import Run
from lightning_peft.compose.schedule import parse_point
from lightning_peft.network.targets import TargetSpec
from lightning_peft_plugins.selective._shared.sparse_update import SparseUpdate
from lightning_peft_plugins.selective.functional.lift import principal_weights


class LIFT(SparseUpdate):
    """Trains the principal weights: the entries that are largest once a matrix is reduced to a low rank.

    The optimizer keeps state for these alone. Now and then they are found anew: what was learnt stays in the weights, and
    entries that are principal still keep their optimizer state.

    Args:
        rank: As many entries of a matrix are trained as a product of this rank has: ``rank * (rows + columns)``.
        filter_rank: The low rank that a matrix is reduced to.
        every: When the entries are found anew: after so many optimizer steps, epochs (``"1ep"``), or a share of the training;
            ``None`` for never.
        tune: Which parameters are trained as they are: ``"bias"``, ``"norm"``, ``"head"`` (the layers that write the logits).
        targets: Layers whose weights are trained.
        exclude: Layers whose weights are not.
        checkpoint: ``"trained"`` leaves what did not change out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: A rank below 1, or a length of zero.

    Example:
        >>> LIFT(rank=16, every=None)
        LIFT(rank=16, filter_rank=128, tune=(), targets='auto', exclude=('head',), ...)
    """

    paper = "Liu et al., LIFT the Veil for the Truth, ICML 2025, arXiv 2506.00772"

    def __init__(
        self,
        rank: int = 128,
        filter_rank: int = 128,
        every: float | str | None = 400,
        tune: Collection[str] = (),
        targets: TargetSpec = "auto",
        exclude: TargetSpec | None = ("head",),
        *,
        checkpoint: Literal["full", "trained"] = "trained",
        name: str | None = None,
    ) -> None:
        super().__init__(tune, targets, exclude, checkpoint=checkpoint, name=name)
        for argument, value in (("rank", rank), ("filter_rank", filter_rank)):
            if value < 1:
                raise MisconfigurationException(f"{argument}={value} must be at least 1.")
        self.rank, self.filter_rank = rank, filter_rank
        self.every = None if every is None else parse_point(every)
        if self.every is not None and self.every.amount <= 0:
            raise MisconfigurationException(f"every={every!r} is no length. Give a number of steps, or every=None for never.")
        self._found_at = 0

    def count(self, weight: Tensor) -> int:
        """As many as a low-rank product has numbers, and no more than there are."""
        matrix = weight.flatten(1)
        return min(self.rank * sum(matrix.shape), matrix.numel())

    def first(self, tensor: str, weight: Tensor) -> Tensor:
        """The principal weights."""
        return principal_weights(weight, self.count(weight), self.filter_rank)

    def start(self, run: Run) -> None:
        """Know when the entries were found last: a file holds the state after its step."""
        self._found_at = run.step

    def after_step(self, run: Run) -> None:
        """Find the entries anew when it is time to."""
        if self.every is None or run.step == self._found_at or run.step % max(1, run.place(self.every, "every=")):
            return
        self._found_at = run.step
        found = {mapped.name: self.first(mapped.name, mapped.leaving(values)) for mapped, values in self.maps(run.module)}
        self.move(run, found, fold=True)

    def awaited(self, run: Run) -> Iterable[str]:
        """Principal weights that were to be found anew."""
        if self.every is not None and run.step < (place := run.place(self.every, "every=")):
            yield f"principal weights were found anew, first after step {place}; every=None asks for none"
