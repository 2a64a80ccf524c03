"""Rules for the learning rate after a network has grown."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft import Run
from lightning_peft.compose.schedule import Point, parse_point


@dataclass(frozen=True)
class LRRule:
    """A rule.

    Attributes:
        restart: Whether schedulers begin again.
        length: Length of a warm-up; ``None`` for none.
        peak: Multiple of the scheduled rate that the warm-up ends at, kept from then on.
    """

    restart: bool = False
    length: Point | None = None
    peak: float = 1.0

    def warmup(self, run: Run) -> int:
        """Return the optimizer steps of the warm-up in a training; 0 for none."""
        return 0 if self.length is None else max(1, run.place(self.length, "The warm-up of lr="))

    def factor(self, since: int | None, steps: int, warmup: int) -> float:
        """Return what the scheduled rate of the next step is multiplied with.

        Args:
            since: Step at which the network grew; ``None`` before.
            steps: Steps done.
            warmup: From :meth:`warmup`.

        Example:
            >>> rule = parse_lr_rule("rewarm:4@0.5")
            >>> [rule.factor(10, steps, 4) for steps in (10, 11, 13, 99)], rule.factor(None, 5, 4)
            ([0.125, 0.25, 0.5, 0.5], 1.0)
        """
        return 1.0 if since is None or warmup == 0 else self.peak * min(1.0, (steps - since + 1) / warmup)


def parse_lr_rule(spec: str) -> LRRule:
    """Read ``"continue"``, ``"restart"``, ``"rewarm:<length>"`` or ``"rewarm:<length>@<peak>"``.

    Raises:
        MisconfigurationException: It is none of these.

    Example:
        >>> parse_lr_rule("rewarm:300@0.3")
        LRRule(restart=False, length=Point(amount=300, unit='step'), peak=0.3)
    """
    if spec in ("continue", "restart"):
        return LRRule(restart=spec == "restart")
    kind, _, rest = spec.partition(":")
    length, _, peak = rest.partition("@")
    try:
        rule = LRRule(length=parse_point(length), peak=float(peak or 1.0))
        if kind == "rewarm" and rule.peak > 0:
            return rule
    except (MisconfigurationException, ValueError):
        pass
    raise MisconfigurationException(
        f'lr={spec!r} is not a rule. Write "continue", "restart", or "rewarm:<length>@<peak>" with a length in steps or '
        'percent and a peak as a multiple of the scheduled rate: "rewarm:300", "rewarm:1%@0.3".'
    )
