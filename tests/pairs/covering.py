"""Pairwise covering arrays: few combinations in which every two values of different factors meet."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

Row = dict[str, str]
Pair = frozenset[str]


def pairs_of(row: Mapping[str, str]) -> set[Pair]:
    """Every two values of a combination."""
    return {frozenset(pair) for pair in itertools.combinations(row.values(), 2)}


def covering(factors: Mapping[str, Sequence[str]], impossible: Collection[Pair] = (), seen: Collection[Pair] = ()) -> list[Row]:
    """Return combinations of values, one of each factor, in which every possible pair of values occurs.

    Greedy, as AETG (Cohen et al., 1997): each row begins with the pair that is wanted first and takes, factor by factor, the
    value that brings most new pairs. The same arguments give the same rows.

    Args:
        factors: Values by factor; values of different factors have different names. The first value of each is the default,
            which goes with everything.
        impossible: Pairs that must not occur.
        seen: Pairs that need not occur.

    Example:
        >>> rows = covering({"a": ["a0", "a1"], "b": ["b0", "b1"], "c": ["c0", "c1"]})
        >>> len(rows), rows[0]
        (4, {'a': 'a0', 'b': 'b0', 'c': 'c0'})
    """
    impossible = set(impossible)
    names = list(factors)
    place = {value: name for name, values in factors.items() for value in values}
    wanted = {
        frozenset(pair): None
        for one, other in itertools.combinations(names, 2)
        for pair in itertools.product(factors[one], factors[other])
    }
    for pair in (*impossible, *seen):
        wanted.pop(frozenset(pair), None)
    rows = []
    while wanted:
        row = {place[value]: value for value in sorted(next(iter(wanted)))}
        for name in names:
            if name not in row:
                row[name] = _best(factors[name], list(row.values()), wanted, impossible)
        for pair in pairs_of(row):
            wanted.pop(pair, None)
        rows.append({name: row[name] for name in names})
    return rows


def _best(values: Sequence[str], chosen: Sequence[str], wanted: Collection[Pair], impossible: Collection[Pair]) -> str:
    def gain(value: str) -> int:
        met = [frozenset((value, other)) for other in chosen]
        return -1 if any(pair in impossible for pair in met) else sum(pair in wanted for pair in met)

    return max(values, key=gain)  # the first of several, so a default where nothing is gained
