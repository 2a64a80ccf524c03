"""Ranks that grow in the course of a training as a method, whatever they are chosen by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Run, Step
from lightning_peft.arguments import not_negative, positive
from lightning_peft.compose.schedule import parse_point
from lightning_peft.contract import SHARDED
from lightning_peft.deltas.sides import Place
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.strategies.support import waits_for_gradients
from lightning_peft_plugins.deltas._shared.blocks_form import BlocksForm
from lightning_peft_plugins.deltas._shared.blocks_part import BlocksPart
from lightning_peft_plugins.deltas._shared.scaled_delta import ScaledDelta


class GrowingRanks(ScaledDelta):
    """Lets the ranks of products grow, up to a budget over all weights; subclasses say when, and which.

    There is room for ``most`` ranks of every weight from the start, so that no parameter comes later: the groups of the
    optimizer, schedulers, checkpoints and processes stay what they are.

    Args:
        rank: Rank of every weight at first.
        target: Rank of a weight in the end, on average over the weights.
        alpha: Numerator of the scale, of which the present rank is the denominator; ``target`` by default.
        increment: What a weight gains at a time; half of ``target`` by default.
        warmup: After how long the first growth comes: steps, ``"10%"`` or ``"1ep"``.
        most: Largest rank of a weight; four times ``target`` by default.
        gamma: Weight of the penalty that holds the factors near orthonormal ones.
        rescale: Let a weight compute what it did when it grows; its product is divided by a larger rank from then on.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Raises:
        MisconfigurationException: A number out of range.

    Attributes:
        ranks: The present rank of every weight, by its name.
    """

    fixed_arguments = frozenset({"scaling"})
    kind: ClassVar[type[BlocksForm]]
    part = BlocksPart
    parts = (BlocksPart,)

    strategies = SHARDED  # how the blocks of ranks are split was not tried

    def __init__(
        self,
        rank: int = 1,
        target: int = 2,
        alpha: float | None = None,
        increment: int | None = None,
        warmup: float | str = "10%",
        most: int | None = None,
        gamma: float = 0.1,
        rescale: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, target if alpha is None else alpha, "rank", **kwargs)
        increment = max(1, target // 2) if increment is None else increment
        most = 4 * target if most is None else most
        if not rank < target <= most:
            raise MisconfigurationException(f"target={target} must be above rank={rank} and at most most={most}.")
        not_negative("gamma", gamma, "Zero leaves the penalty out.")
        positive("increment", increment)
        self.target, self.increment, self.most = target, increment, most
        self.warmup, self.gamma, self.rescale = parse_point(warmup), gamma, rescale
        self.ranks: dict[str, int] = {}
        self._forms: dict[str, Any] = {}
        self._first, self._length, self._grown_at = 0, 1, 0

    def arguments(self, place: Place) -> dict[str, Any]:
        blocks = (min(self.most, place.layout.largest_rank) - self.rank) // self.increment
        return super().arguments(place) | {"scale": self.alpha, "increment": self.increment, "blocks": blocks}

    def start(self, run: Run) -> None:
        """Place the growths in the training."""
        self._find_forms(run.module)
        self._first = run.place(self.warmup, "warmup=")

    def _find_forms(self, module: nn.Module) -> None:
        self._forms = dict(self.forms(module))
        self._note_ranks()

    def _note_ranks(self) -> None:
        self.ranks = {name: form.ranks for name, form in self._forms.items()}

    @property
    def _missing(self) -> int:
        """Ranks that are still to come."""
        room = sum(form.room for form in self._forms.values())
        return min(self.target * len(self._forms), room) - sum(self.ranks.values())

    def gap(self) -> Tensor:
        """Mean distance of the factors from orthonormal ones."""
        raise NotImplementedError

    def consider(self, run: Run) -> None:
        """Before a step, while ranks are missing: grow where it is time, see :meth:`due` and :meth:`grow`."""
        raise NotImplementedError

    def loss(self, step: Step) -> Tensor | None:
        terms = [self.gamma * self.gap()] if self.gamma else []
        if waits_for_gradients(step.run.trainer.strategy):
            terms += [0 * parameter.sum() for form in self._forms.values() for parameter in form.idle()]
        return torch.stack(terms).sum() if terms else None

    @torch.no_grad()
    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Leave out what is not trained yet, and let ranks grow."""
        moved = trained_by(optimizer)
        if not any(form.down[0] in moved for form in self._forms.values()):
            return
        for form in self._forms.values():
            for parameter in form.idle():
                parameter.grad = None  # nothing moves, and no optimizer begins a state for it
        if self._missing >= self.increment and not run.skips(optimizer):
            self.consider(run)

    def due(self, step: int) -> bool:
        """Whether a growth comes before a step."""
        return step > self._first and step % self._length == 0 and step != self._grown_at

    def grow(self, scores: Sequence[float], count: int, step: int) -> None:
        """Let the weights of largest score grow that have room, without passing the budget.

        Args:
            scores: Score of each weight.
            count: How many weights grow at most.
            step: The step before which they do.
        """
        ranking = sorted(zip(scores, self._forms.values(), strict=True), key=lambda pair: -pair[0])
        growing = [form for _, form in ranking if not form.full]
        for form in growing[: min(count, self._missing // self.increment)]:
            form.grow(self.rescale)
        self._grown_at = step
        self._note_ranks()
        if self._missing < self.increment:
            for form in self._forms.values():
                form.settle()
            said = ", ".join(f"{rank} of {name}" for name, rank in self.ranks.items())
            rank_zero_info(f"{self.name}: the ranks have grown to {self.target} on average at step {step}: {said}.")

    def finish(self, run: Run) -> None:
        """Let go of the forms."""
        self._forms = {}

    def awaited(self, run: Run) -> Iterator[str]:
        """The last growth."""
        if self._forms and self._missing >= self.increment:
            mean = sum(self.ranks.values()) / len(self.ranks)
            yield f"ranks had grown to target={self.target} on average; they are at {mean:.3g}"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained, with the room there is, and the mean rank."""
        return {**super().metrics(run), "rank": sum(self.ranks.values()) / max(1, len(self.ranks))}
