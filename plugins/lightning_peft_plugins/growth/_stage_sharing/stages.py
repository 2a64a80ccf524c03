"""Stages: runs of neighbouring blocks of a network, written as their lengths."""

from __future__ import annotations

from collections.abc import Sequence


def spread(blocks: int, stages: int) -> list[int]:
    """Divide blocks among stages as evenly as can be, the first stages getting what is left over.

    Five stages make a network of twelve blocks as in the SWS paper, ``0 0 0 1 1 1 2 2 3 3 4 4``.

    Example:
        >>> spread(12, 5)
        [3, 3, 2, 2, 2]
    """
    each, left = divmod(blocks, stages)
    return [each + (stage < left) for stage in range(stages)]


def stage_of_block(lengths: Sequence[int]) -> list[int]:
    """Number the stage of every block.

    Example:
        >>> stage_of_block([3, 1, 2])
        [0, 0, 0, 1, 2, 2]
    """
    return [stage for stage, length in enumerate(lengths) for _ in range(length)]


def middles(blocks: int, stages: int) -> list[int]:
    """Choose one of some blocks for every stage, evenly over the depth.

    The middle of each part, not its first: timm's first block has no layer for stochastic depth.

    Example:
        >>> middles(12, 4), middles(4, 4)
        ([1, 4, 7, 10], [0, 1, 2, 3])
    """
    return [(2 * stage + 1) * blocks // (2 * stages) for stage in range(stages)]


def stage_means(values: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Give every block the mean over its stage.

    Example:
        >>> stage_means([0.0, 0.2, 0.4], [2, 1])
        [0.1, 0.1, 0.4]
    """
    stages = stage_of_block(lengths)
    sums = [sum(value for value, s in zip(values, stages, strict=True) if s == stage) for stage in range(len(lengths))]
    return [sums[stage] / lengths[stage] for stage in stages]
