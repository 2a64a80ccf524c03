"""Constructor arguments of methods: their names, checks of their types, and their form as plain data."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import numbers
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, Union

from lightning.fabric.utilities.exceptions import MisconfigurationException

_NUMBERS = {float: numbers.Real, int: numbers.Integral}  # those of NumPy too


def whole_signature(cls: type) -> inspect.Signature:
    """Signature of a class whose ``__init__`` hands ``**kwargs`` on to its bases: all that it takes, by name.

    What it gives to a base itself it names in ``fixed_arguments``.
    """
    parameters: dict[str, inspect.Parameter] = {}
    fixed: Any = getattr(cls, "fixed_arguments", ())
    for init in _constructors(cls):
        own = list(inspect.signature(init).parameters.values())[1:]
        for parameter in own:
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.name not in fixed:
                parameters.setdefault(parameter.name, parameter)
    return inspect.Signature(sorted(parameters.values(), key=lambda parameter: parameter.kind))


def _constructors(cls: type) -> Iterator[Any]:
    """Yield the ``__init__`` of a class and of its bases, as far as keyword arguments are handed on."""
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        yield init
        if all(entry.kind is not inspect.Parameter.VAR_KEYWORD for entry in inspect.signature(init).parameters.values()):
            return


def one_of(argument: str, value: object, choices: Iterable[object]) -> None:
    """Check that an argument is one of a few values.

    Args:
        argument: Its name.
        value: What was given.
        choices: What is possible.

    Raises:
        MisconfigurationException: It is none of them; the nearest and all are named.

    Example:
        >>> one_of("scope", "layre", ["global", "layer", "row"])
        Traceback (most recent call last):
        ...
        lightning...MisconfigurationException: scope='layre' is unknown; choose one of global, layer, row. Did you mean layer?
    """
    known = list(choices)
    if value in known:
        return
    names = list(map(str, known))
    near = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    raise MisconfigurationException(
        f"{argument}={value!r} is unknown; choose one of {', '.join(names)}.{f' Did you mean {near[0]}?' if near else ''}"
    )


def positive(argument: str, value: float, hint: str = "") -> None:
    """Check that an argument is above zero.

    Args:
        argument: Its name.
        value: What was given.
        hint: What to do instead, a sentence.

    Raises:
        MisconfigurationException: It is zero or negative.

    Example:
        >>> positive("strength", 0.0, "Leave the method out for none.")
        Traceback (most recent call last):
        ...
        lightning...MisconfigurationException: strength=0.0 must be positive. Leave the method out for none.
    """
    if not value > 0:
        raise MisconfigurationException(f"{argument}={value!r} must be positive.{f' {hint}' if hint else ''}")


def not_negative(argument: str, value: float, hint: str = "") -> None:
    """Check that an argument is zero or above.

    Args:
        argument: Its name.
        value: What was given.
        hint: What to do instead, a sentence.

    Raises:
        MisconfigurationException: It is negative.

    Example:
        >>> not_negative("gamma", -1.0, "Zero leaves the penalty out.")
        Traceback (most recent call last):
        ...
        lightning...MisconfigurationException: gamma=-1.0 must not be negative. Zero leaves the penalty out.
    """
    if value < 0:
        raise MisconfigurationException(f"{argument}={value!r} must not be negative.{f' {hint}' if hint else ''}")


def decay(argument: str, value: float) -> None:
    """Check that an argument can be the decay of a running average.

    Args:
        argument: Its name.
        value: What was given.

    Raises:
        MisconfigurationException: It is not between 0 and 1.

    Example:
        >>> decay("beta1", 1.5)
        Traceback (most recent call last):
        ...
        lightning...MisconfigurationException: beta1=1.5 must be between 0 and 1, the share of the average that stays.
    """
    if not 0 < value < 1:
        raise MisconfigurationException(f"{argument}={value!r} must be between 0 and 1, the share of the average that stays.")


def check_types(cls: type, given: Mapping[str, Any]) -> None:
    """Refuse arguments that are not of the annotated type, or NaN, before a constructor compares or splits them.

    Which values of a type make sense is for the constructor to say.

    Raises:
        MisconfigurationException: Names the argument, what it takes and what it was given.
    """
    hints = _hints(cls)
    for name, value in given.items():
        hint = hints.get(name, Any)
        if not fits(value, hint):
            shown = repr(value) if len(repr(value)) < 60 else f"a {type(value).__name__}"
            raise MisconfigurationException(
                f"{cls.__name__}({name}=...) takes {readable(hint)}, not {shown}, which is of type {type(value).__name__}."
            )
        if isinstance(value, float) and value != value:
            raise MisconfigurationException(f"{cls.__name__}({name}=...) is NaN. Give it a number.")


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for init in _constructors(cls):
        try:
            own = typing.get_type_hints(init)
        except (NameError, TypeError):  # names that are imported for type checkers only
            continue
        hints = own | hints
    return hints


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, as far as that can be seen; literals count as any value of their type.

    Example:
        >>> fits(1, float), fits("1", float), fits(None, float | None), fits(["a"], list[int]), fits("b", Literal["a"])
        (True, False, True, False, True)
        >>> from collections.abc import Iterable
        >>> fits({"a": 1}, Mapping[str, int]), fits({"a": "b"}, Mapping[str, int]), fits({"a": 1}, Iterable[str])
        (True, False, True)
    """
    if hint is Any:
        return True
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inside)
    if origin is Literal:
        return any(type(value) is type(each) for each in inside)
    kind = _NUMBERS.get(hint, origin or (type(None) if hint is None else hint))
    if not isinstance(kind, type):
        return True  # type variables, and what a later Python brings
    if kind is type:
        return isinstance(value, type)
    if not isinstance(value, kind):
        return False
    if len(inside) == 2 and isinstance(value, Mapping):
        return all(fits(key, inside[0]) and fits(item, inside[1]) for key, item in value.items())
    if len(inside) == 1 and isinstance(value, (list, tuple, set, frozenset)):
        return all(fits(item, inside[0]) for item in value)
    return True


def readable(hint: Any) -> str:
    """An annotation as a reader would write it.

    Example:
        >>> readable(Mapping[str, float] | None)
        'Mapping[str, float] or None'
    """
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    text = re.sub(r"Optional\[(Literal\[.*\])\]$", r"\1 | None", re.sub(r"\b[a-z_.]+\.(?=[A-Za-z])", "", text))
    return text.replace("NoneType", "None").replace(" | ", " or ")


def as_plain(value: Any) -> Any:
    """Turn a constructor argument into plain data; what is neither data nor a dataclass becomes its repr."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else repr(value)
