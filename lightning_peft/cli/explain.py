"""One message out of what jsonargparse and constructors say about a recipe that cannot be used."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Iterator

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft import registry
from lightning_peft.cli.recipes import Recipe, UsageError

# What jsonargparse says about the types of a Union that the user did not mean.
_NOISE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a path but",
    "Not a valid subclass",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
)
_UNION = "Does not validate against any of the Union subtypes"


@contextlib.contextmanager
def as_usage_errors(recipe: Recipe) -> Iterator[None]:
    """Say in one message why a recipe cannot be parsed or built.

    Raises:
        UsageError: It cannot.
    """
    # Class names alone ("class_path: NMSparsity") resolve among classes that are already imported.
    for entry in registry.installed().values():
        with contextlib.suppress(MisconfigurationException):
            entry.load()
    try:
        yield
    except ArgumentError as error:
        raise UsageError(
            f"The recipe {recipe.name} ({recipe.path}) cannot be used as given: {essence(str(error.message))}"
        ) from error
    except ValueError as error:
        if not str(error).startswith(_UNION):
            raise
        cause = error.__cause__ or error.__context__
        reason = essence(str(error)) if cause is None else _reason(cause)
        raise UsageError(f"The recipe {recipe.name} ({recipe.path}) cannot be built: {reason}") from error


def _reason(cause: BaseException) -> str:
    if isinstance(cause, MisconfigurationException):
        return str(cause)
    return f"{type(cause).__name__}: {cause}"


def essence(message: str) -> str:
    """Keep of jsonargparse's report on a union of types what a user can act on.

    Example:
        >>> essence('''Parser key "model":
        ...   Does not validate against any of the Union subtypes
        ...   Errors:
        ...     - Problem with given class_path 'my.Net':
        ...         Parser key "width":
        ...           Expected a <class 'int'>. Got value: abc
        ...     - Expected a <class 'NoneType'>''')
        'model: my.Net: width: expected int, got abc'
    """
    kept: list[str] = []
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        problem = line.startswith("Problem with given class_path")
        if problem and any(other.startswith("Problem") for other in kept):
            break  # the same said of another type of the Union
        if line and not line.startswith(_NOISE):
            kept.append(line)
    reasons = [line for line in kept if not re.fullmatch(r"Expected an? <class 'NoneType'>", line)]
    told = any(not line.startswith("Parser key") for line in reasons)
    text = " ".join(reasons if told else kept) or message
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    text = re.sub(r"<class '([\w.]+)'>", lambda match: match[1].removeprefix("builtins."), text)
    text = re.sub(r"Expected a ([\w.]+)\. Got value:", r"expected \1, got", text)
    known = list(registry.installed()) if "callbacks" in text else []
    text = re.sub(r"Expected a dot import path string: (\S+)", lambda match: _no_class(match[1], known), text)
    text = re.sub(r"Problem with given class_path '([\w.]+)': Option '([\w.]+)' is not accepted", _no_argument, text)
    text = re.sub(r"Expected an? ([\w.]+)$", r"expected \1", text)
    return re.sub(r"Problem with given class_path '([\w.]+)':", r"\1:", text)


def _no_class(name: str, known: list[str]) -> str:
    return f"there is no class {name}.{registry.suggest(name, known) if known else ''}"


def _no_argument(match: re.Match[str]) -> str:
    path, argument = match[1], match[2]
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    takes = [key for key in inspect.signature(found).parameters if key not in ("args", "kwargs")] if callable(found) else []
    return f"{name} has no argument {argument!r}.{registry.suggest(argument, takes) if takes else ''}"
