"""The life of method objects over runs: as new when a clock begins, as before when a run is rejected."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn

from lightning_peft.compose.run import Run
from lightning_peft.contract import Contract
from lightning_peft.renewal import give_back, note_begin, note_end, renew

_LAST: weakref.WeakKeyDictionary[Contract, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""The module each method took part in a fit of last."""


class MethodLives:
    """Follows the methods of one run from its beginning to its end.

    Args:
        methods: The methods.
        run: The run.
        fitting: Whether the Trainer fits.
    """

    def __init__(self, methods: Sequence[Contract], run: Run, *, fitting: bool) -> None:
        self._methods = methods
        self._module = run.module
        self._fitting = fitting
        self._held = [note_begin(method) for method in methods]
        if fitting and (run.trainer.global_step == 0 or self._strangers()):
            for method in methods:
                renew(method)
        for method in methods:
            method.run = run

    def _strangers(self) -> bool:
        """Whether a method trained another module last."""
        known = (reference for method in self._methods if (reference := _LAST.get(method)) is not None)
        return any(reference() is not self._module for reference in known)

    def end(self, *, refused: bool) -> None:
        """Note what the run leaves of each method; a run that was refused leaves all as it was."""
        for method, held in zip(self._methods, self._held, strict=True):
            method.run = None
            if refused:
                give_back(method, held)
                continue
            if self._fitting:
                _LAST[method] = weakref.ref(self._module)
            note_end(method)
