"""Taps: what a submodule was given and what it returned during the current training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.capture.shim import Shim

MAX_CALLS = 64  # a step that calls its network more often than this does not want all of them remembered


def forward_attribute(module: nn.Module) -> str:
    """Name of the attribute to shadow so that every call of a module is seen.

    A module compiled in place with ``Module.compile`` is seen outside its compiled region.
    """
    return "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"


def step_compiler(module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """Return what compiles the steps of ``torch.compile(LightningModule)``; ``None`` for a module that is not compiled whole.

    A compiled step compiles all it calls. What is taken out of it, because it must run as Python, leaves the network behind
    uncompiled, unless that is compiled on its own.
    """
    context = getattr(module, "_compiler_ctx", None)
    return None if context is None else context["dynamo_ctx"]


@dataclass(slots=True)
class Captured:
    """One call of a tapped module: positional arguments, keyword arguments, output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Tap:
    """Remembers the calls of one module while it is open; calls made within such a call are not its own.

    The module's ``forward`` is shadowed rather than hooked: hooks registered after a first compiled call never fire
    (pytorch#117758).

    Args:
        module: The module to watch.
        name: Its qualified name, for messages.
        compiler: What :func:`step_compiler` gave for the LightningModule.
    """

    def __init__(
        self, module: nn.Module, name: str, compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    ) -> None:
        self.name = name
        self.calls: list[Captured] = []
        self._module = module
        self._compiler = compiler
        self._open = self._inside = False
        self._shim: Shim | None = None

    def install(self) -> None:
        """Start shadowing the module."""
        attribute, traced = forward_attribute(self._module), self._compiler is None
        self._shim = Shim(self._module, attribute, self._record, traced=traced, compiler=self._compiler).install()

    def remove(self) -> None:
        """Stop shadowing the module and forget what was seen."""
        self.close()
        if self._shim is not None:
            self._shim.remove()
            self._shim = None

    def open(self) -> None:
        """Begin a step: forget earlier calls and remember the next ones."""
        self.calls.clear()
        self._open = True

    def close(self) -> None:
        """End a step and let go of its tensors."""
        self._open = False
        self.calls.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Remember no call meanwhile; those of before stay."""
        before, self._open = self._open, False
        try:
            yield
        finally:
            self._open = before

    def last(self) -> Captured:
        """Return the latest call of this step.

        Raises:
            MisconfigurationException: The module was not called.
        """
        if not self.calls:
            raise MisconfigurationException(
                f"The network {self.name or '(the module itself)'!r} was not called during this training step, so its logits "
                'are unknown. Name the submodule your training_step calls with network="<name>".'
            )
        return self.calls[-1]

    def _record(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._open or self._inside:  # what a call of the module makes of it, such as a method's further passes
            return inner(*args, **kwargs)
        self._inside = True
        try:
            output = inner(*args, **kwargs)
        finally:
            self._inside = False
        if len(self.calls) < MAX_CALLS:
            self.calls.append(Captured(args, kwargs, output))
        return output
