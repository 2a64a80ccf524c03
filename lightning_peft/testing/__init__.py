"""Tools for authors who test methods: :class:`MethodTester`, tiny LightningModules, toy methods, a two-process runner.

Only this folder may import pytest; nothing else in the library imports this folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_peft.testing.ddp import run_ddp
from lightning_peft.testing.modules import STYLES, Plain, loader, trainer
from lightning_peft.testing.trace import trace

if TYPE_CHECKING:
    from lightning_peft.testing.tester import MethodTester

__all__ = ["STYLES", "MethodTester", "Plain", "loader", "run_ddp", "trace", "trainer"]


def __getattr__(name: str) -> Any:
    if name == "MethodTester":  # late, so that the tiny modules can be used without pytest
        from lightning_peft.testing.tester import MethodTester

        return MethodTester
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
