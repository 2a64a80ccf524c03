"""Tools for authors who test methods: :class:`MethodTester`, tiny LightningModules, toy methods, a two-process runner.

Only this folder may import pytest; nothing else in the library imports this folder.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_peft.testing.ddp import run_ddp
from lightning_peft.testing.modules import STYLES, Plain, loader, trainer
from lightning_peft.testing.trace import trace

if TYPE_CHECKING:
    from lightning_peft.testing.adaptation import AdaptationTester
    from lightning_peft.testing.references import Reference, Task
    from lightning_peft.testing.tester import MethodTester

__all__ = ["STYLES", "AdaptationTester", "MethodTester", "Plain", "Reference", "Task", "loader", "run_ddp", "trace", "trainer"]

# Late, so that the tiny modules can be used without pytest.
_WITH_PYTEST = {"AdaptationTester": "adaptation", "MethodTester": "tester", "Reference": "references", "Task": "references"}


def __getattr__(name: str) -> Any:
    if name in _WITH_PYTEST:
        return getattr(import_module(f"{__name__}.{_WITH_PYTEST[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
