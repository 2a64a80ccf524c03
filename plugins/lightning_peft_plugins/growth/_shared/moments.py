"""A trigger in a training that runs: has its moment come?"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_peft import Run
from lightning_peft.structure.forms import entries, fields, number, whole
from lightning_peft_plugins.growth._shared.triggers import Plateau, parse_trigger, tokens_in

MOMENT = fields({"tokens": whole(), "plateau": entries(number(infinite=True), whole())})
"""Form of :meth:`Moment.state`."""


class Moment:
    """Watches a training for one trigger.

    Args:
        at: The trigger, in the grammar of :func:`~lightning_peft_plugins.growth._shared.triggers.parse_trigger`.
        monitor: Metric that ``"plateau"`` watches, by default the first logged one with "val" and "loss" in its name.
        patience: Looks at it without progress that make a plateau.
        min_delta: Relative fall that counts as progress.
    """

    def __init__(self, at: str | float, monitor: str | None = None, patience: int = 3, min_delta: float = 0.01) -> None:
        self.at, self.trigger = at, parse_trigger(at)
        self.monitor = monitor
        self._plateau = Plateau(patience, min_delta)
        self._tokens = 0
        self._point = 0

    def start(self, run: Run) -> None:
        """Place a point of training in this one; whole epochs are where they are, whatever they are long."""
        if self.trigger.point is not None and self._epoch is None:
            self._point = run.place(self.trigger.point, "at=")

    @property
    def _epoch(self) -> int | None:
        point = self.trigger.point
        return int(point.amount) if point is not None and point.unit == "epoch" and point.amount % 1 == 0 else None

    def come(self, steps: int, epochs: int) -> bool:
        """Whether the moment has come after so many optimizer steps and whole epochs."""
        if self.trigger.kind == "plateau":
            return self._plateau.reached
        if self._epoch is not None:
            return epochs >= self._epoch
        return self._tokens >= self.trigger.tokens if self.trigger.kind == "tokens" else steps >= self._point

    def __str__(self) -> str:
        if self.trigger.kind == "plateau":
            return f"a plateau: {self._plateau.waited} of {self._plateau.patience} looks had seen no progress"
        if self.trigger.kind == "tokens":
            return f"{self.trigger.tokens:.6g} tokens, of which {self._tokens} were seen"
        return f"at={self.at!r}" if self._epoch is not None else f"at={self.at!r}, step {self._point}"

    def count(self, trainer: Trainer, batch: Any) -> None:
        """Count the tokens of a batch on all ranks, when they matter."""
        if self.trigger.kind == "tokens":
            seen = torch.tensor(tokens_in(batch), device=trainer.strategy.root_device)
            self._tokens += int(trainer.strategy.reduce(seen, reduce_op="sum"))

    def look(self, trainer: Trainer) -> None:
        """Look at the watched metric after a validation, when it matters.

        Raises:
            MisconfigurationException: It was not logged.
        """
        if self.trigger.kind != "plateau" or trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        name = self.monitor or next((key for key in metrics if "val" in key and "loss" in key), None)
        if name not in metrics:
            raise MisconfigurationException(
                f'at="plateau" watches {name or "a validation loss"}, which was not logged. Choose one with monitor=; logged '
                f"are {', '.join(sorted(metrics)) or 'none'}."
            )
        self._plateau.look(trainer.strategy.broadcast(metrics[name]))

    def state(self) -> dict[str, Any]:
        """The observations so far, as plain data."""
        return {"tokens": self._tokens, "plateau": [self._plateau.best, self._plateau.waited]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self._tokens = state["tokens"]
        self._plateau.best, self._plateau.waited = state["plateau"]
