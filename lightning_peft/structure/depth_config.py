"""Configurations of a network with another number of blocks, as candidates for its class to build."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

Place: TypeAlias = tuple[str, ...]
"""Keys that lead to a value through configurations within configurations."""


@dataclass(frozen=True)
class Counter:
    """A number of a configuration that may count the blocks.

    Attributes:
        place: Keys that lead to it.
        index: Its position, where a list counts the blocks of several stages.
    """

    place: Place
    index: int | None = None

    def __str__(self) -> str:
        return ".".join(self.place) + ("" if self.index is None else f"[{self.index}]")

    def set(self, value: Any, count: int) -> Any:
        """Return what stands at the place with another count."""
        if self.index is None:
            return count
        return type(value)([*value[: self.index], count, *value[self.index + 1 :]])


def counters(config: Any, count: int) -> list[Counter]:
    """Find the numbers of a configuration that may count ``count`` blocks; the likely ones come first.

    Example:
        >>> from types import SimpleNamespace
        >>> [str(each) for each in counters(SimpleNamespace(heads=2, depths=[4, 2], n_layer=2), 2)]
        ['depths[1]', 'n_layer', 'heads']
    """
    found = []
    for at, holder in holders(config):
        for key, value in vars(holder).items():
            if _is_count(value, count) and not key.startswith("_"):
                found.append(Counter((*at, key)))
            elif isinstance(value, (list, tuple)) and not key.startswith("_"):
                found += [Counter((*at, key), index) for index, entry in enumerate(value) if _is_count(entry, count)]
    return sorted(found, key=lambda each: not any(word in each.place[-1] for word in ("layer", "depth", "block")))


def _is_count(value: Any, count: int) -> bool:
    return type(value) is int and value == count


def holders(config: Any, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield a configuration and those within it, with the keys that lead to each."""
    yield at, config
    for key, value in vars(config).items():
        if type(value).__name__.endswith("Config") and hasattr(value, "__dict__"):
            yield from holders(value, (*at, key))


def candidates(
    config: Any, counter: Counter, before: int, sources: Sequence[int], built: Mapping[Place, list[Any]]
) -> Iterator[dict[Place, Any]]:
    """Yield what a configuration may say after an edit: first with all that depends on the count, last the count alone.

    Args:
        config: The configuration before.
        counter: What counts the blocks.
        before: Their number before.
        sources: Old position of every new block.
        built: Lists with an entry a block as they were built, where a training began with fewer.
    """
    holder = value_at(config, counter.place[:-1])
    key = counter.place[-1]
    count = {counter.place: counter.set(vars(holder)[key], len(sources))}
    derived = {
        (*counter.place[:-1], name): value for name, value in _derived(holder, key, count[counter.place], before).items()
    }
    lists = {(*counter.place[:-1], name): value for name, value in vars(holder).items() if _is_list(name, value, before)}
    lists |= {
        place: value_at(config, place) for place, value in derived.items() if _has_length(value_at(config, place), before)
    }
    lists.pop(counter.place, None)
    removes = all(a < b for a, b in pairwise(sources))
    for place, value in lists.items():
        if removes:  # what is left of the list goes with the blocks
            derived[place] = type(value)(value[source] for source in sources)
        elif len(built.get(place, ())) >= len(sources):
            derived[place] = type(value)(built[place][: len(sources)])
        elif place not in derived or not _regular(holder, key, place[-1], before):
            derived[place] = type(value)(value[source] for source in sources)
    kept = {place: value for place, value in derived.items() if place in lists}
    tried: list[dict[Place, Any]] = []
    for further in (derived, kept, {}):
        if (whole := {**further, **count}) not in tried:
            tried.append(whole)
            yield whole


def _is_list(key: str, value: Any, count: int) -> bool:
    named = any(word in key for word in ("layer", "block")) and not key.startswith("_")
    return named and _has_length(value, count) and all(isinstance(entry, (int, float, str)) for entry in value)


def _has_length(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count


def _derived(holder: Any, key: str, value: Any, before: int) -> dict[str, Any]:
    """What the class of a configuration makes of another count where it says now what it makes of this one."""
    now, then, own = *_made_both(holder, key, value, before), vars(holder)
    changed = {name for name in {*now} & {*then} & {*own} - {key} if now[name] != then[name]}
    return {name: then[name] for name in changed if now[name] == own[name] or _has_length(own[name], before)}


def _regular(holder: Any, key: str, name: str, before: int) -> bool:
    """Whether a list is the one its class makes by itself."""
    now, _ = _made_both(holder, key, vars(holder)[key], before)
    return name in now and bool(now[name] == vars(holder)[name])


def _made_both(holder: Any, key: str, value: Any, before: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a configuration says when its class makes it with the present count, and with another.

    All that may follow from the count is left to the class: numbers equal to it and lists; if it needs the lists, those of
    another length are kept.
    """
    given = copy.deepcopy(holder.to_dict() if hasattr(holder, "to_dict") else vars(holder))
    given = {name: now for name, now in given.items() if not name.startswith("_") and not _is_count(now, before)}
    others = {name: now for name, now in given.items() if not isinstance(now, (list, tuple))}
    for kept in (others, {name: now for name, now in given.items() if not _has_length(now, before)}):
        try:
            now, then = (vars(type(holder)(**{**kept, key: copy.deepcopy(count)})) for count in (vars(holder)[key], value))
        except Exception:  # its class may refuse any of this
            continue
        return now, then
    return {}, {}


def value_at(config: Any, place: Place) -> Any:
    """Return what stands at a place of a configuration."""
    for key in place:
        config = getattr(config, key)
    return config


def with_values(config: Any, values: Mapping[Place, Any]) -> Any:
    """Return a copy of a configuration that says something else at some places."""
    changed = copy.deepcopy(config)
    for place, value in values.items():
        setattr(value_at(changed, place[:-1]), place[-1], copy.deepcopy(value))
    return changed
