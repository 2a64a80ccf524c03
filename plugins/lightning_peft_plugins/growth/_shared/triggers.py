"""When to grow: points of training, tokens seen, or a plateau of a metric."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.compose.schedule import Point, parse_point


@dataclass(frozen=True)
class Trigger:
    """A moment to grow.

    Attributes:
        kind: A point of training, a number of tokens, or a plateau.
        point: The point.
        tokens: The number of tokens, of all ranks together.
    """

    kind: Literal["point", "tokens", "plateau"]
    point: Point | None = None
    tokens: float = 0.0


def parse_trigger(spec: float | str) -> Trigger:
    """Read a trigger.

    Args:
        spec: ``"step:5000"``, ``"epoch:2"``, ``"30%"``, ``"tokens:1e9"`` or ``"plateau"``; a number is a point of training too.

    Raises:
        MisconfigurationException: It is none of these.

    Example:
        >>> parse_trigger("tokens:1e9").tokens, parse_trigger("30%").point
        (1000000000.0, Point(amount=0.3, unit='fraction'))
    """
    text = str(spec).strip().lower()
    if text == "plateau":
        return Trigger("plateau")
    if match := re.fullmatch(r"tokens:\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?)", text):
        return Trigger("tokens", tokens=float(match[1]))
    try:
        return Trigger("point", parse_point(spec))
    except MisconfigurationException:
        raise MisconfigurationException(
            f'at={spec!r} is not a moment of training. Write "step:5000", "epoch:2", "30%", "tokens:1e9" or "plateau".'
        ) from None


def tokens_in(batch: Any) -> int:
    """Count the tokens of a batch: elements of ``input_ids``, or of the first tensor of integers.

    Raises:
        MisconfigurationException: The batch holds no integers.

    Example:
        >>> import torch
        >>> tokens_in({"input_ids": torch.zeros(2, 8, dtype=torch.long)})
        16
    """
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return int(batch["input_ids"].numel())
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    for item in items:
        if isinstance(item, Tensor) and not item.is_floating_point():
            return item.numel()
    raise MisconfigurationException('at="tokens:..." counts token ids, but the batch holds no tensor of integers.')


@dataclass
class Plateau:
    """Watches a metric that should fall.

    Attributes:
        patience: Looks without progress that make a plateau.
        min_delta: Relative fall that counts as progress.
        best: Lowest value so far; infinite before the first look.
        waited: Looks since then.
    """

    patience: int
    min_delta: float
    best: float = float("inf")
    waited: int = 0

    def look(self, value: float) -> None:
        """Take a new value into account; one that is NaN or infinite says nothing.

        Example:
            >>> plateau = Plateau(patience=2, min_delta=0.01)
            >>> for value in (1.0, 0.5, 0.499, 0.498):
            ...     plateau.look(value)
            >>> plateau.reached
            True
        """
        if not math.isfinite(value):
            return
        if value < self.best * (1 - self.min_delta if self.best > 0 else 1 + self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    @property
    def reached(self) -> bool:
        """Whether there was no progress for long enough."""
        return self.waited >= self.patience
