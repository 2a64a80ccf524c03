"""The memory a method has of a run, and how it is cleared when another training begins.

A method's ``__init__`` says what it is before any run, so it is run again, on the same object and with the arguments that
were first given. Its author declares nothing, and cannot forget anything.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

_ENGINE = frozenset({"_origin", "_arguments", "_hub", "run"})


@dataclass
class Origin:
    """Where a method comes from.

    Attributes:
        given: The constructor arguments its user gave.
        first: Attributes when its last training began.
        left: Attributes when its last run ended; ``None`` before there was one.
    """

    given: dict[str, Any]
    first: dict[str, Any] = field(default_factory=dict)
    left: dict[str, Any] | None = None


@dataclass(frozen=True)
class Held:
    """The attributes of a method before a run."""

    attributes: dict[str, Any]
    first: dict[str, Any]
    left: dict[str, Any] | None


def note_begin(method: Any) -> Held:
    """Note what a method is before a run, to give it back with :func:`give_back`."""
    origin: Origin = method._origin
    if origin.left is None:
        origin.first = _attributes(method)
    return Held(dict(vars(method)), origin.first, origin.left)


def note_end(method: Any) -> None:
    """Note what a run leaves, to tell it from what the method's user changes afterwards."""
    method._origin.left = _attributes(method)


def give_back(method: Any, held: Held) -> None:
    """Let a method be what it was before a run that was refused."""
    if held.left is None:  # it never ran, and what it held may have changed in place
        rebuild(method)
    else:
        vars(method).clear()
        vars(method).update(held.attributes)
    method._origin.first, method._origin.left = held.first, held.left


def renew(method: Any) -> None:
    """Make a method what it was before its first run.

    What was changed on it between two runs, or before the first as a plain value, is configuration and stays.
    """
    origin: Origin = method._origin
    if origin.left is None:
        return
    changed = {key: value for key, value in _attributes(method).items() if not _same(value, origin.left.get(key, origin))}
    rebuild(method)
    vars(method).update(changed)
    origin.first, origin.left = _attributes(method), None


def rebuild(method: Any) -> None:
    """Run ``__init__`` again, and set what the user had set before the last training began."""
    origin: Origin = method._origin
    for key in vars(method).keys() - _ENGINE:
        del vars(method)[key]
    _construct(method, origin.given)
    built = vars(method)
    for key, value in origin.first.items():
        if key not in built or (_is_plain(value) and not _same(value, built[key])):
            built[key] = value


def _construct(method: Any, given: Mapping[str, Any]) -> None:
    signature = inspect.signature(type(method))
    kinds = {signature.parameters[key].kind for key in given}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
        bound = inspect.BoundArguments(signature, dict(given))
        method.__init__(*bound.args, **bound.kwargs)
    else:  # by name, because what a base class takes has no place of its own in a subclass
        method.__init__(**given)


def _attributes(method: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(method).items() if key not in _ENGINE}


def _same(value: Any, other: Any) -> bool:
    return value is other or (_is_plain(value) and type(value) is type(other) and bool(value == other))


def _is_plain(value: Any) -> bool:
    """Whether a value cannot change in place, so that it says at any time what was set."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        frozen = type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
        return frozen and all(_is_plain(getattr(value, entry.name)) for entry in dataclasses.fields(value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, type, enum.Enum, FunctionType))
