"""Finding methods by name without importing them: entry points of installed packages, and classes defined in this process.

Merge functions are found in the same way.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

GROUP, MERGES = "lightning_peft.plugins", "lightning_peft.merges"

_DEFINED_HERE: dict[str, type[Any]] = {}


@dataclass(frozen=True)
class MethodEntry:
    """An installed method, or merge function: its public name, where it lives, and the distribution that ships it."""

    name: str
    value: str
    distribution: str
    version: str

    @property
    def family(self) -> str:
        """Package folder that holds the method, such as ``sparsity``; the module itself when it is in none."""
        return self.value.partition(":")[0].split(".")[-2:][0]

    def load(self) -> Any:
        """Import the class, or the function.

        Raises:
            MisconfigurationException: The plugin cannot be imported.
        """
        try:
            loaded = EntryPoint(self.name, self.value, GROUP).load()
        except Exception as error:
            raise _misconfiguration(
                f"The method {self.name} of the package {self.distribution} {self.version} could not be imported: "
                f"{type(error).__name__}: {error}. Other methods are not affected; upgrade or remove that package."
            ) from error
        return loaded


@cache
def installed() -> dict[str, MethodEntry]:
    """Return the methods of all installed packages by name; reads package metadata only.

    Raises:
        MisconfigurationException: Two packages register one name.
    """
    return _registered(GROUP)


@cache
def merge_functions() -> dict[str, MethodEntry]:
    """Return the merge functions of all installed packages by name, see :func:`installed`."""
    return _registered(MERGES)


def _registered(group: str) -> dict[str, MethodEntry]:
    found: dict[str, MethodEntry] = {}
    described = cache(lambda dist: (dist.name, dist.version) if dist else ("unknown", "?"))  # each asks for a file to be parsed
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        entry = MethodEntry(point.name, point.value, *described(point.dist))
        twin = found.get(point.name)
        if twin is not None and twin.value != entry.value:
            raise _misconfiguration(
                f"Two installed packages register the method {point.name}: {twin.distribution} ({twin.value}) and "
                f"{entry.distribution} ({entry.value}). Uninstall one of them."
            )
        found[point.name] = entry
    return found


def define(method: type[Any]) -> None:
    """Remember a method class defined in this process, so that its own checkpoints can be read without an entry point."""
    _DEFINED_HERE[method.__name__] = method


def find(name: str) -> type[Any]:
    """Return the method class called ``name``.

    Only installed entry points and classes already imported are considered: a name read from a file never leads to the
    import of anything else.

    Raises:
        MisconfigurationException: Unknown name; the nearest ones are listed.
    """
    entries = installed()
    if name in entries:
        found: type[Any] = entries[name].load()
        return found
    if name in _DEFINED_HERE:
        return _DEFINED_HERE[name]
    raise _misconfiguration(f"There is no method {name!r}.{suggest(name, [*entries, *_DEFINED_HERE])}")


def suggest(name: str, candidates: list[str]) -> str:
    """Return " Did you mean ...?" or the list of what exists, ready to end an error message."""
    lowered = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.5)
    if close:
        return f" Did you mean {' or '.join(lowered[match] for match in close)}?"
    return f" Known names: {', '.join(sorted(candidates)) or 'none'}."


def _misconfiguration(message: str) -> MisconfigurationException:
    """Lightning is imported for an error only: it brings torch, and finding names must not wait for it."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return MisconfigurationException(message)
