"""N:M patterns as written by users, and the frame schedules that reach a pattern in several steps."""

from __future__ import annotations

import re

from lightning.fabric.utilities.exceptions import MisconfigurationException

Frame = tuple[int, int, int]


def check_pattern(n: int, m: int) -> None:
    """Raise unless ``n`` kept of ``m`` consecutive weights is a possible pattern.

    Raises:
        MisconfigurationException: If ``m < 2``, ``n < 1`` or ``n > m``.
    """
    if m < 2:
        raise MisconfigurationException(f"N:M sparsity needs groups of at least 2 weights, got {n}:{m}. Use e.g. '2:4'.")
    if n < 1:
        raise MisconfigurationException(
            f"N:M sparsity keeps at least 1 weight per group, got {n}:{m}. Use n >= 1, e.g. '1:{m}'."
        )
    if n > m:
        swapped = f"Did you mean '{m}:{n}'?" if m >= 1 else ""
        raise MisconfigurationException(f"N:M sparsity keeps N of M consecutive weights, so N <= M, got {n}:{m}. {swapped}")


def parse_pattern(pattern: str | tuple[int, int]) -> tuple[int, int]:
    """Read an N:M pattern.

    Args:
        pattern: ``"N:M"``, or the pair itself (checked and returned).

    Returns:
        ``(n, m)``: weights kept, and consecutive weights per group.

    Raises:
        MisconfigurationException: If it is not of the form ``"N:M"`` or is impossible.

    Example:
        >>> parse_pattern("2:4")
        (2, 4)
    """
    if isinstance(pattern, str):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", pattern)
        if match is None:
            raise MisconfigurationException(
                f"Cannot read the sparsity pattern {pattern!r}. Write 'N:M' (N weights kept of every M), e.g. '2:4'."
            )
        n, m = int(match[1]), int(match[2])
    else:
        if len(pattern) != 2 or not all(type(value) is int for value in pattern):
            raise MisconfigurationException(
                f"A sparsity pattern is 'N:M' or a pair of integers (N, M), got {pattern!r}. Use e.g. '2:4' or (2, 4)."
            )
        n, m = pattern
    check_pattern(n, m)
    return n, m


def _frames(patterns: list[tuple[int, int]], start: int, end: int) -> list[Frame]:
    if end <= start:
        raise MisconfigurationException(f"The frames need end > start, got start={start}, end={end}.")
    # Keyed by start: with fewer units than frames, the later (sparser) frame takes the place of the empty earlier one.
    begins = {start + i * (end - start) // len(patterns): pattern for i, pattern in enumerate(patterns)}
    return [(begin, n, m) for begin, (n, m) in begins.items()]


def stepwise_frames(n: int, m: int, start: int, end: int) -> list[Frame]:
    """Equal frames with fewer and fewer weights kept: ``(m-1):m``, ``m/2:m``, ``m/4:m``, ... and last ``n:m``.

    SDGF-stepwise of "Progressive Gradient Flow for Robust N:M Sparsity Training" (Bambhaniya et al., 2024). The official
    code halves a fixed number of times and so never reaches a target that is not ``m`` over a power of two (3:8 ends on
    4:8); here the last frame is always exactly ``n:m``.

    Args:
        n: Weights kept at the end.
        m: Group size.
        start: First unit (step or epoch, the caller's clock) of the first frame.
        end: Unit at which the last frame's nominal length ends; ``n:m`` holds from its start on.

    Returns:
        ``(first unit, n, m)`` per frame, strictly increasing in the unit.

    Raises:
        MisconfigurationException: On an impossible pattern or ``end <= start``.

    Example:
        >>> stepwise_frames(1, 8, 10, 90)
        [(10, 7, 8), (30, 4, 8), (50, 2, 8), (70, 1, 8)]
        >>> stepwise_frames(3, 8, 0, 90)
        [(0, 7, 8), (30, 4, 8), (60, 3, 8)]
    """
    check_pattern(n, m)
    counts = [m - 1] if m - 1 > n else []
    halved = m // 2
    while halved > n:
        if halved < m - 1:
            counts.append(halved)
        halved //= 2
    return _frames([(count, m) for count in [*counts, n]], start, end)


def geometric_frames(n: int, m: int, start: int, end: int) -> list[Frame]:
    """Four equal frames of one density and shrinking groups: ``8n:8m``, ``4n:4m``, ``2n:2m``, ``n:m``.

    SDGF-geometric of "Progressive Gradient Flow for Robust N:M Sparsity Training" (Bambhaniya et al., 2024). Dimensions
    that ``8m`` does not divide have a dense remainder in the early frames.

    Args:
        n: Weights kept per group at the end.
        m: Group size at the end.
        start: First unit (step or epoch, the caller's clock) of the first frame.
        end: Unit at which the last frame's nominal length ends; ``n:m`` holds from its start on.

    Returns:
        ``(first unit, n, m)`` per frame, strictly increasing in the unit.

    Raises:
        MisconfigurationException: On an impossible pattern or ``end <= start``.

    Example:
        >>> geometric_frames(1, 8, 0, 100)
        [(0, 8, 64), (25, 4, 32), (50, 2, 16), (75, 1, 8)]
    """
    check_pattern(n, m)
    return _frames([(n * scale, m * scale) for scale in (8, 4, 2, 1)], start, end)
