"""The lines that load what a command made, tried out before anybody reads them."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.cli.classes import import_class
from lightning_peft.cli.launch import RecipeCLI

STAND_IN = "MyModule"  # for a class nothing is known of


@dataclass(frozen=True)
class Loading:
    """How to load a network.

    Attributes:
        lines: Python that leaves it in ``net``; none when no way was found.
        ordinary: Whether the lines do without this library.
        refusal: Why the last way that was tried does not work; empty when one does.
    """

    lines: tuple[str, ...] = ()
    ordinary: bool = False
    refusal: str = ""

    @property
    def text(self) -> str:
        """The remarks to print about the lines."""
        if not self.lines:
            return f"No short way to load the network was found: {self.refusal}"
        tried = "These lines gave the tested network, tensor by tensor, when this was written."
        if self.ordinary:
            return (
                "These lines gave the tested network, tensor by tensor, when this was written. They do without lightning_peft."
            )
        return (
            f"{tried} Its structure changed in training, so the class alone builds another one; lightning_peft follows the "
            "changes recorded in the checkpoint."
        )


def find_loading(
    cli: RecipeCLI, baked: Path, checkpoint: Path, state: Mapping[str, Tensor], *, trusted: bool = False
) -> Loading:
    """Find the shortest lines that load a network, by running them.

    Args:
        cli: The parsed recipe.
        baked: Its baked checkpoint.
        checkpoint: Its checkpoint of training.
        state: Tensors the loaded network must have, by name.
        trusted: Whether Python objects in the files may be rebuilt.
    """
    path, given = str(cli.config.model.class_path), _arguments(cli)
    module, _, name = path.rpartition(".")
    head = [*_search_path(path), f"from {module} import {name}"]
    trust = ", trusted=True" if trusted else ""
    both = list(dict.fromkeys(("", given)))
    plain, ours = (repr(str(file.resolve())) for file in (baked, checkpoint))
    attempts = [(*head, f"net = {name}.load_from_checkpoint({plain}, weights_only={not trusted}{more})") for more in both]
    with_us = (*head[:-1], "import lightning_peft", head[-1])
    attempts += [(*with_us, f"net = lightning_peft.load_from_checkpoint({name}, {ours}{trust}{more})") for more in both]
    refusal = ""
    for attempt in attempts:
        refusal = run_lines(attempt, state)
        if not refusal:
            return Loading(attempt, "import lightning_peft" not in attempt)
    return Loading(refusal=refusal)


def recorded_class(arguments: Any) -> tuple[tuple[str, ...], str]:
    """Return the line that imports the class a checkpoint was trained with, and its name; nothing is imported.

    Args:
        arguments: Constructor arguments in a checkpoint, to which LightningCLI adds the class.

    Example:
        >>> recorded_class({"_class_path": "shop.models.Net", "width": 8}), recorded_class({"width": 8})
        ((('from shop.models import Net',), 'Net'), ((), 'MyModule'))
    """
    path = str(arguments.get("_class_path", "")) if isinstance(arguments, Mapping) else ""
    module, _, name = path.rpartition(".")
    known = module and all(word.isidentifier() for word in path.split("."))
    return ((f"from {module} import {name}",), name) if known else ((), STAND_IN)


def stored_lines(target: Path, arguments: Any, edits: int, *, trusted: bool = False) -> tuple[list[str], str]:
    """Return lines that load a checkpoint of an ordinary module as ``net``, and a sentence to print before them.

    Args:
        target: The file.
        arguments: Constructor arguments in it.
        edits: How often its structure changed in training.
        trusted: Whether Python objects in it may be rebuilt.
    """
    head, name = recorded_class(arguments)
    place = repr(str(target.resolve()))
    how = (
        f", with your class for {name} and, unless it saves them, the arguments it was trained with" if name == STAND_IN else ""
    )
    if not edits:
        lines = [*head, f"net = {name}.load_from_checkpoint({place}, weights_only={not trusted})"]
        return lines, f"It loads without lightning_peft{how}:"
    trust = ", trusted=True" if trusted else ""
    lines = ["import lightning_peft", *head, f"net = lightning_peft.load_from_checkpoint({name}, {place}{trust})"]
    note = f"Its structure changed in training ({edits} changes), which the class alone may not build. It loads so{how}:"
    return lines, note


def recorded_build(arguments: Any) -> tuple[str, ...]:
    """Return lines that build the module a checkpoint was trained with as ``net``; none where the file does not say how.

    Example:
        >>> recorded_build({"_class_path": "shop.models.Net", "width": 8})
        ('from shop.models import Net', 'net = Net(width=8)')
    """
    head, name = recorded_class(arguments)
    given = {key: value for key, value in arguments.items() if not key.startswith("_")} if head else {}
    if not head or not all(key.isidentifier() and _is_plain(value) for key, value in given.items()):
        return ()
    return (*head, f"net = {name}({', '.join(f'{key}={value!r}' for key, value in given.items())})")


def _is_plain(value: Any) -> bool:
    """Whether the ``repr`` of an argument gives it back, and it does not describe an object LightningCLI would build."""
    if isinstance(value, dict):
        return "class_path" not in value and all(_is_plain(item) for item in (*value, *value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))


def run_lines(lines: Sequence[str], state: Mapping[str, Tensor]) -> str:
    """Run lines that load a network, and say why they do not give one with these tensors; nothing when they do."""
    scope: dict[str, Any] = {}
    try:
        quiet = contextlib.redirect_stdout(io.StringIO())
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), quiet:
            warnings.simplefilter("ignore")
            exec("\n".join(lines), scope)
    except Exception as error:  # whatever a user's class raises
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    own = scope["net"].state_dict()
    if set(own) != set(state):
        return f"other tensors are loaded: {', '.join(sorted(set(own) ^ set(state))[:3])}"
    other = [name for name, value in own.items() if isinstance(value, Tensor) and not _same(value, state[name])]
    return f"other values are loaded: {', '.join(other[:3])}" if other else ""


def _same(one: Tensor, other: Tensor) -> bool:
    one, other = one.cpu(), other.cpu()
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _arguments(cli: RecipeCLI) -> str:
    """Write the arguments of the model that are not its defaults, for a class that does not save them."""
    init = cli.config.model.get("init_args")
    given = {} if init is None else init.as_dict()
    defaults = inspect.signature(import_class(str(cli.config.model.class_path))).parameters
    words = [
        f", {key}={value!r}"
        for key, value in given.items()
        if isinstance(value, (int, float, str, bool, list, dict, type(None)))
        and (key not in defaults or defaults[key].default != value)
    ]
    return "".join(words)


def _search_path(path: str) -> list[str]:
    """Name the folder a class is found in, where Python does not look by itself."""
    module = import_class(path).__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or "site-packages" in Path(file).parts or module.split(".")[0].startswith("lightning"):
        return []
    package = Path(file).name == "__init__.py"
    folder = Path(file).resolve().parents[module.count(".") + package]
    return [f"import sys; sys.path.append({str(folder)!r})"]
