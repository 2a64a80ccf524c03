"""What a merge function is: tensors by position, which the engine supplies, and options by keyword, which the user chooses.

A function of a plugin, registered by entry point, looks like this one::

    @merge_function(elementwise=True)
    def task_arithmetic(deltas: Tensor) -> Tensor:
        return deltas.sum(0)

Its first parameter says what it combines and what it returns: ``models``, the values of one tensor in every model, stacked to
``(n, *shape)``, for the merged value; or ``deltas``, their differences to the base's, for the merged difference. Parameters
that follow by position are looked up by name:

``base``: the base's value. ``weights``: ``(n,)``, what the user gave for every model, or ones. ``fisher``: like ``models``,
the Fisher information of each. ``generators``: one a model, seeded by seed, model and tensor. ``depth``: where the tensor
stands in the network, from 0, the first block and what is outside of blocks, to 1. ``place``: where it stands among the
model's tensors, from 0 to 1. Any other name is a survey's.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from lightning_peft import registry
from lightning_peft.arguments import fits, one_of, readable
from lightning_peft.merging.errors import MergeError

SUPPLIED = ("base", "weights", "fisher", "generators", "depth", "place")

Stacks = Callable[[], Iterator[Tensor]]
"""Goes through the first parameter of a merge function, piece by piece, ``(n, entries)`` each; can be called again."""
Survey = Callable[..., Any]
FunctionT = TypeVar("FunctionT", bound=Callable[..., Tensor])

_TRAITS = "_merge_traits"


@dataclass(frozen=True)
class Traits:
    """What :func:`merge_function` noted of a function."""

    elementwise: bool = False
    surveys: Mapping[str, Survey] = field(default_factory=dict)
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None


def merge_function(
    *,
    elementwise: bool = False,
    surveys: Mapping[str, Survey] | None = None,
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Callable[[FunctionT], FunctionT]:
    """Note how a function merges; the function stays as it is.

    Args:
        elementwise: Whether each entry of the result depends on the same entry of every model alone, but for surveys. Then
            tensors come flat and in pieces, which stay in the processor's cache.
        surveys: By the name of a positional parameter, a function that finds its value from a look at all tensors: it takes
            :data:`Stacks`, then earlier surveys and options by the names of its parameters. Where its first parameter is
            called ``fisher``, it takes those of the Fisher information. With ``per_tensor=True`` it looks at one tensor at a
            time.
        rescale: Of a function of ``deltas``: takes the norms of the models' whole differences, ``(n,)``, and that of the merged
            one, and returns what the latter is multiplied by.
    """

    def note(function: FunctionT) -> FunctionT:
        setattr(function, _TRAITS, Traits(elementwise, dict(surveys or {}), rescale))
        return function

    return note


@dataclass(frozen=True)
class MergeFunction:
    """A merge function with the options chosen for it.

    Attributes:
        name: What it is registered as.
        function: The function.
        options: Its keyword arguments, all of them.
    """

    name: str
    function: Callable[..., Tensor]
    options: Mapping[str, Any]

    @property
    def traits(self) -> Traits:
        """How it merges."""
        found: Traits = getattr(self.function, _TRAITS, Traits())
        return found

    @property
    def supplied(self) -> tuple[str, ...]:
        """Its positional parameters."""
        return _parameters(self.function, inspect.Parameter.POSITIONAL_OR_KEYWORD)

    @property
    def of_deltas(self) -> bool:
        """Whether it combines differences to a base."""
        return self.supplied[0] == "deltas"

    def __call__(self, **supplied: Any) -> Tensor:
        """Merge one tensor, or a piece of it."""
        return self.function(*(supplied[name] for name in self.supplied), **self.options)

    def survey(self, stacks: Stacks, fisher: Stacks) -> dict[str, Any]:
        """Look at all tensors, or at one, and at the Fisher information of them."""
        found: dict[str, Any] = {}
        for name, look in self.traits.surveys.items():
            known = {**self.options, **found}
            first, *wanted = inspect.signature(look).parameters
            found[name] = look(fisher if first == "fisher" else stacks, **{key: known[key] for key in wanted})
        return found


def _parameters(function: Callable[..., Any], kind: Any) -> tuple[str, ...]:
    return tuple(name for name, each in inspect.signature(function).parameters.items() if each.kind is kind)


def find(method: str | Callable[..., Tensor], options: Mapping[str, Any]) -> MergeFunction:
    """Return a merge function with its options.

    Args:
        method: Name of a registered one, or one itself.
        options: What the user chose.

    Raises:
        MergeError: There is no such function, it is none, or it has no such option, or an option is of another type.
    """
    name, function = method if isinstance(method, str) else getattr(method, "__name__", "function"), method
    if isinstance(function, str):
        installed = registry.merge_functions()
        one_of("method", name, installed)
        function = installed[name].load()
    _check(name, function)
    defaults = {
        key: each.default
        for key, each in inspect.signature(function).parameters.items()
        if each.kind is inspect.Parameter.KEYWORD_ONLY
    }
    hints = typing.get_type_hints(function)
    for key, value in options.items():
        if key not in defaults:
            raise MergeError(f"The method {name!r} has no option {key!r}.{registry.suggest(key, list(defaults))}")
        if not fits(value, hints.get(key, Any)) or value != value:
            raise MergeError(f"{name}({key}=...) takes {readable(hints.get(key, Any))}, not {value!r}.")
    chosen = defaults | dict(options)
    if missing := [key for key, value in chosen.items() if value is inspect.Parameter.empty]:
        raise MergeError(f"The method {name!r} needs the option {missing[0]!r}.")
    return MergeFunction(name, function, chosen)


def _check(name: str, function: Callable[..., Tensor]) -> None:
    """Refuse a function whose parameters nobody could supply."""
    supplied = _parameters(function, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    surveys = getattr(function, _TRAITS, Traits()).surveys
    if not supplied or supplied[0] not in ("models", "deltas"):
        raise MergeError(f"{name} is no merge function: its first parameter must be called models or deltas.")
    if unknown := [each for each in supplied[1:] if each not in SUPPLIED and each not in surveys]:
        raise MergeError(
            f"{name} is no merge function: nothing supplies its parameter {unknown[0]!r}. By position are supplied "
            f"{', '.join(SUPPLIED)} and its surveys; options follow a *, by keyword."
        )
