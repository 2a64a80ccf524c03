"""One instance attribute that stands in front of one bound method of an object the user owns."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

Handler = Callable[..., Any]


class Shim:
    """A callable kept in ``owner.__dict__[name]`` that routes calls through a handler.

    Lightning inspects the methods it calls: their signature through one level of ``__wrapped__``, whether they are
    overridden through ``__code__``. Both answers come from the user's own method, so a shim is invisible to them.
    Copies are clean: pickle, ``torch.save`` and ``copy.deepcopy`` of the owner yield the plain method bound to the copy,
    because the shim reduces to ``getattr(owner, name)``.

    Args:
        owner: The object whose method is shadowed; held weakly.
        name: Name of the method.
        handler: Called as ``handler(inner, *args, **kwargs)``, where ``inner`` is the method that was there before.
        traced: Whether ``torch.compile`` may look into the handler when it compiles what calls the shim. A handler that keeps
            tensors, changes modes or runs the method several times must run as Python.
        compiler: Compiles the shadowed method on its own, for a handler that is not traced.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        handler: Handler,
        *,
        traced: bool = True,
        compiler: Callable[[Handler], Handler] | None = None,
    ) -> None:
        self._owner = weakref.ref(owner)
        self._name = name
        self._handler: Handler | None = handler if traced else torch.compiler.disable(handler)  # type: ignore[no-untyped-call]
        self._shadowed = owner.__dict__.get(name)
        self._inner: Handler = getattr(owner, name) if compiler is None else compiler(getattr(owner, name))
        # Lightning follows exactly one level, so the chain of a user's own decorators is collapsed here.
        self.__wrapped__ = getattr(self._inner, "__wrapped__", self._inner)
        self.__name__ = name

    @property
    def __code__(self) -> Any:
        return self._inner.__code__

    @property
    def __self__(self) -> Any:
        return self._owner()

    def install(self) -> Shim:
        """Put the shim in place and return it."""
        self._owner().__dict__[self._name] = self
        return self

    def remove(self) -> None:
        """Give the owner back what it had; become a plain pass-through if somebody has since wrapped the shim.

        The order in which shims on one method are removed does not matter.
        """
        self._handler = None
        owner = self._owner()
        if owner is None or owner.__dict__.get(self._name) is not self:
            return
        before = self._shadowed
        while isinstance(before, Shim) and before._handler is None:
            before = before._shadowed
        if before is None:
            del owner.__dict__[self._name]
        else:
            owner.__dict__[self._name] = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._handler is None:
            return self._inner(*args, **kwargs)
        return self._handler(self._inner, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner(), self._name)
