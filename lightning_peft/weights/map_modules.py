"""Shows who walks over a module its layer parts, and weight maps with parameters of their own, after everything else in it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_peft.weights.mapped_layer import MappedLayer


class MapModules:
    """Stands in front of ``named_modules`` of the module that maps were attached to.

    ``parameters()`` asks it, and so do DDP and averages of the module: a map's own parameters are trained, synchronised and
    averaged with the module, but come last. What the module has of its own keeps its position, and no submodule gains a
    parameter. Copies of the module show their own maps; pickles show none.

    Args:
        root: The module; held weakly.
    """

    name = "named_modules"

    def __init__(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)

    @classmethod
    def show(cls, root: nn.Module) -> None:
        """Show parts, and maps that have parameters or buffers of their own; nothing changes where there are none."""
        if not isinstance(vars(root).get(cls.name), cls):
            shown = cls(root)
            if any(True for _ in shown._maps("", set())):
                vars(root)[cls.name] = shown

    @classmethod
    def hide(cls, root: nn.Module) -> None:
        """Give the module its own ``named_modules`` back."""
        if isinstance(vars(root).get(cls.name), cls):
            del vars(root)[cls.name]

    def __call__(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        yield from self._walk(memo, prefix, remove_duplicate)
        for name, weight_map in self._maps(prefix, set()):
            yield from weight_map.named_modules(memo, name, remove_duplicate)

    def _walk(self, memo: set[nn.Module], prefix: str, remove_duplicate: bool) -> Iterator[tuple[str, nn.Module]]:
        root: Any = self._root()
        return type(root).named_modules(root, memo, prefix, remove_duplicate)  # type: ignore[no-any-return]

    def _maps(self, prefix: str, memo: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        for path, layer in self._walk(memo, prefix, True):
            if isinstance(layer, MappedLayer):
                for name, weight_map in layer._named_maps(f"{path}." if path else ""):
                    if any(True for _ in weight_map.parameters()) or any(True for _ in weight_map.buffers()):
                        yield name.removesuffix("."), weight_map
                yield from ((name.removesuffix("."), part) for name, part in layer._named_parts(f"{path}." if path else ""))

    def __deepcopy__(self, memo: dict[int, Any]) -> MapModules:
        return MapModules(copy.deepcopy(self._root(), memo))  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._root(), self.name)


class WithinModules(MapModules):
    """The same for a module within, when it is asked itself; whoever walks over all modules sees parts and maps at the end."""

    def __call__(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        if memo is None:
            yield from super().__call__(memo, prefix, remove_duplicate)
        else:  # a walk from outside hands on what it has seen
            yield from self._walk(memo, prefix, remove_duplicate)


@contextmanager
def shown_within(root: nn.Module) -> Iterator[None]:
    """Show parts and maps to who asks a module within for its parameters, as ``configure_optimizers`` often does."""
    paths = {path for path, layer in root.named_modules() if isinstance(layer, MappedLayer)}
    above = {".".join(path.split(".")[:depth]) for path in paths for depth in range(1, path.count(".") + 2)}
    within = [root.get_submodule(path) for path in sorted(above)]
    for module in within:
        WithinModules.show(module)
    try:
        yield
    finally:
        for module in within:
            WithinModules.hide(module)
