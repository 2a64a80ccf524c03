"""Forms: what data read back from a file must look like before anything is made of it.

A form is a function of a value and its place; it returns a sentence about the first thing that is wrong, or ``None``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Form: TypeAlias = Callable[[Any, str], str | None]


def whole(least: int = 0, most: float = math.inf) -> Form:
    """A whole number from ``least`` to ``most``.

    Example:
        >>> whole()(-3, "['steps']"), whole()(True, "['steps']"), whole()(3, "['steps']")
        ("['steps'] is -3, not a whole number from 0", "['steps'] is True, not a whole number from 0", None)
    """
    span = f"from {least}" if most == math.inf else f"from {least} to {most}"
    return lambda value, place: (
        None if type(value) is int and least <= value <= most else f"{place} is {_shown(value)}, not a whole number {span}"
    )


def number(least: float = -math.inf, *, infinite: bool = False) -> Form:
    """A number, not below ``least`` and never NaN.

    Args:
        least: Smallest value.
        infinite: Whether infinity is one.
    """

    def form(value: Any, place: str) -> str | None:
        fits = type(value) in (int, float) and value >= least and (infinite or math.isfinite(value))
        return None if fits else f"{place} is {_shown(value)}, not a number{'' if least == -math.inf else f' from {least:g}'}"

    return form


def flag(value: Any, place: str) -> str | None:
    """``True`` or ``False``."""
    return None if isinstance(value, bool) else f"{place} is {_shown(value)}, not True or False"


def text(value: Any, place: str) -> str | None:
    """A string."""
    return None if isinstance(value, str) else f"{place} is {_shown(value)}, not a string"


def anything(value: Any, place: str) -> str | None:
    """Whatever there is; for what the reader checks itself."""
    return None


def maybe(form: Form) -> Form:
    """``None``, or a value of a form."""
    return lambda value, place: None if value is None else form(value, place)


def list_of(form: Form, *lengths: int) -> Form:
    """A list of values of one form; with ``lengths``, of one of these lengths."""

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, list):
            return f"{place} is {_shown(value)}, not a list"
        if lengths and len(value) not in lengths:
            return f"{place} has {len(value)} entries, not {' or '.join(map(str, lengths))}"
        return next(filter(None, (form(item, f"{place}[{i}]") for i, item in enumerate(value))), None)

    return check


def entries(*forms: Form) -> Form:
    """A list with one value of each form.

    Example:
        >>> entries(whole(), flag)([1], "['pair']")
        "['pair'] has 1 entries, not 2"
    """

    def check(value: Any, place: str) -> str | None:
        if (found := list_of(anything, len(forms))(value, place)) is not None:
            return found
        pairs = enumerate(zip(forms, value, strict=True))
        return next(filter(None, (form(item, f"{place}[{i}]") for i, (form, item) in pairs)), None)

    return check


def dict_of(form: Form, keys: Collection[str] | None = None, kind: str = "tensor of the module") -> Form:
    """A dict of strings to values of one form.

    Args:
        form: Form of every value.
        keys: Keys it may have; any when ``None``.
        kind: What a key is, for the message.
    """

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return f"{place} is {_shown(value)}, not a dict"
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{place} has the key {_shown(key)}, which is not a string"
            if keys is not None and key not in keys:
                return f"{place} has the key {key!r}, which is not a {kind}"
            if (found := form(item, f"{place}[{key!r}]")) is not None:
                return found
        return None

    return check


def fields(forms: Mapping[str, Form]) -> Form:
    """A dict with exactly these keys.

    Example:
        >>> fields({"done": whole()})({}, ""), fields({"done": whole()})({"done": 1, "more": 2}, "")
        ("it lacks 'done'", "it has 'more', which this version does not know")
    """

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return f"{place or 'it'} is {_shown(value)}, not a dict"
        for key in forms:
            if key not in value:
                return f"{place or 'it'} lacks {key!r}"
        for key in value:
            if key not in forms:
                return f"{place or 'it'} has {_shown(key)}, which this version does not know"
        return next(filter(None, (form(value[key], f"{place}[{key!r}]") for key, form in forms.items())), None)

    return check


def tensor(shape: Collection[int] | None = None, *, finite: bool = True) -> Form:
    """A tensor of floating-point numbers.

    Args:
        shape: Its shape; any when ``None``.
        finite: Whether NaN and infinity are refused.
    """

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return f"{place} is {_shown(value)}, not a tensor of floating-point numbers"
        if shape is not None and value.shape != torch.Size(shape):
            return f"{place} has shape {tuple(value.shape)}, not {tuple(shape)}"
        return f"{place} holds NaN or infinity" if finite and not value.isfinite().all() else None

    return check


def tensors_like(tensors: Mapping[str, Tensor] | None, *, finite: bool = True) -> Form:
    """A dict of tensors by the names of a module's tensors, each of the shape of its namesake.

    Args:
        tensors: The module's, by plain name; ``None`` when the module is not at hand, then any names and shapes do.
        finite: Whether NaN and infinity are refused.
    """

    def check(value: Any, place: str) -> str | None:
        if (found := dict_of(anything, None if tensors is None else tensors)(value, place)) is not None:
            return found
        for name, item in value.items():
            form = tensor(None if tensors is None else tensors[name].shape, finite=finite)
            if (found := form(item, f"{place}[{name!r}]")) is not None:
                return found
        return None

    return check


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"a {type(value).__name__} of {len(shown)} characters"
