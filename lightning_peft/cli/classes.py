"""Classes that a configuration names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft import registry
from lightning_peft.cli.recipes import UsageError


def class_name(entry: Namespace) -> str:
    """Return the class name in a parsed callback entry."""
    return str(entry.get("class_path", "")).rsplit(".", 1)[-1]


def import_class(path: str) -> type[Any]:
    """Return the class with this dotted path.

    Raises:
        UsageError: There is none.
    """
    module, _, name = path.rpartition(".")
    try:
        found: type[Any] = getattr(import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UsageError(f"There is no class {path}: {error}") from error
    return found


def is_method(name: str) -> bool:
    """Whether a class name is that of a method, installed or defined by what was imported so far."""
    if name in registry.installed():
        return True
    try:
        registry.find(name)
    except MisconfigurationException:
        return False
    return True
