"""How many blocks go, and which."""

from __future__ import annotations

from collections.abc import Mapping

Choice = dict[str, list[int]]
"""Positions of blocks by the name of their list."""


def goal(amount: int | float, blocks: int) -> int:
    """Return how many of so many blocks an amount is: a number of them, or a share, rounded to at least one.

    Example:
        >>> goal(3, 12), goal(0.25, 12), goal(0.25, 6), goal(0.1, 4)
        (3, 3, 2, 1)
    """
    return amount if isinstance(amount, int) else max(1, int(amount * blocks + 0.5))


def lowest(scores: Mapping[str, Mapping[int, float]], room: Mapping[str, int], count: int) -> Choice:
    """Choose the blocks with the lowest scores, ranked together.

    Args:
        scores: Score by position, by list.
        room: How many may leave each list.
        count: How many go.

    Returns:
        Positions by list, ascending; fewer in all when there is no room.

    Example:
        >>> lowest({"a": {0: 0.1, 1: 0.2, 2: 0.9}, "b": {5: 0.3}}, {"a": 1, "b": 3}, 2)
        {'a': [0], 'b': [5]}
    """
    chosen: Choice = {}
    for _, path, place in sorted((score, path, place) for path, row in scores.items() for place, score in row.items()):
        if sum(map(len, chosen.values())) < count and len(chosen.get(path, ())) < room[path]:
            chosen.setdefault(path, []).append(place)
    return {path: sorted(places) for path, places in chosen.items()}
