"""What becomes of the learning rate when a network has grown."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException

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
        f'lr={spec!r} is no rule. Write "continue", "restart", or "rewarm:<length>@<peak>" with a length in steps or percent '
        'and a peak as a multiple of the scheduled rate: "rewarm:300", "rewarm:1%@0.3".'
    )
