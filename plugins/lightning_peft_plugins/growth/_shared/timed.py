"""What the methods that change a network in the middle of its training share: moments, and learning rates afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_peft.compose.run import Run
from lightning_peft.method import Method
from lightning_peft.structure.forms import Form, fields, list_of, maybe, whole
from lightning_peft_plugins.growth._shared.lr_rules import parse_lr_rule
from lightning_peft_plugins.growth._shared.moments import MOMENT, Moment


class TimedMethod(Method):
    """Base of the methods that change the network at moments of its training and may warm learning rates up again.

    Subclasses ask :meth:`due` and say :meth:`mark_done`.

    Args:
        at: When: ``"step:5000"``, ``"epoch:2"``, ``"30%"``, ``"tokens:1e9"``, ``"plateau"``, or a list of them.
        lr: ``"continue"``, ``"restart"`` or ``"rewarm:<length>@<peak>"``.
        monitor: Metric that ``"plateau"`` watches, by default the first logged one with "val" and "loss" in its name.
        patience: Looks at it without progress that make a plateau.
        min_delta: Relative fall that counts as progress.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.

    Attributes:
        done: Changes so far.
        changed_at: Optimizer steps before the last of them; ``None`` before the first.
    """

    def __init__(
        self,
        at: str | float | Sequence[str | float],
        lr: str,
        *,
        monitor: str | None = None,
        patience: int = 3,
        min_delta: float = 0.01,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(network=network, name=name)
        events = [at] if isinstance(at, (str, int, float)) else at
        self.moments = [Moment(event, monitor, patience, min_delta) for event in events]
        self.lr_rule = parse_lr_rule(lr)
        self._warmup = 0
        self.done = 0
        self.changed_at: int | None = None

    def start(self, run: Run) -> None:
        """Place the moments in this training."""
        for moment in self.moments:
            moment.start(run)
        self._warmup = self.lr_rule.warmup(run)

    def due(self, run: Run, *, stepped: bool = False) -> bool:
        """Whether the next change is due, if there is one: before a step, or just after it (``stepped``)."""
        epochs = run.epoch + int(stepped and run.trainer.is_last_batch)
        return self.done < len(self.moments) and self.moments[self.done].come(self.steps, epochs)

    def mark_done(self, whole: bool = True) -> None:
        """Count a change, made now, or note the moment of one whose other part is still to come."""
        self.done += whole
        self.changed_at = self.steps

    def awaited(self, run: Run) -> Iterator[str]:
        """The changes that did not come, and the end of a warm-up."""
        for moment in self.moments[self.done :]:
            yield f"its change at {moment}"
        if self.changed_at is not None and self.steps < self.changed_at + self._warmup:
            yield f"the end of the warm-up at step {self.changed_at + self._warmup}"

    def lr_factor(self) -> float:
        """Warm up after a change."""
        return self.lr_rule.factor(self.changed_at, self.steps, self._warmup)

    def batch_start(self, run: Run, batch: Any) -> None:
        """Count tokens, after the batch had its chance to be the first of the changed network."""
        for moment in self.moments:
            moment.count(run.trainer, batch)

    def validation_end(self, run: Run) -> None:
        """Look at the metric that the next plateau is made of."""
        if self.done < len(self.moments):
            self.moments[self.done].look(run.trainer)

    def state(self) -> dict[str, Any]:
        """How many changes are made, when the last was, and what the moments have seen."""
        return {"done": self.done, "changed_at": self.changed_at, "moments": [moment.state() for moment in self.moments]}

    def state_fields(self) -> dict[str, Form]:
        """Form of each entry of the state, which subclasses add to."""
        return {
            "done": whole(0, len(self.moments)),
            "changed_at": maybe(whole()),
            "moments": list_of(MOMENT, len(self.moments)),
        }

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields(self.state_fields())

    def load_state(self, state: dict[str, Any]) -> None:
        self.done, self.changed_at = state["done"], state["changed_at"]
        for moment, seen in zip(self.moments, state["moments"], strict=True):
            moment.load_state(seen)
