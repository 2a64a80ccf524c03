"""Runs of :class:`~lightning_peft.testing.tester.MethodTester` in each of two processes."""

from __future__ import annotations

from typing import Any

from lightning_peft.method import Method
from lightning_peft.testing.ddp import load_module
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft.testing.trace import trace


def train_on_rank(source: str, module: str, tester: str) -> list[Any]:
    """Train every configuration of a tester as one rank of a group, after a module without methods."""
    try:
        home = load_module(module)
    except ImportError:
        home = load_module(source)
    owner: Any = home
    for part in tester.split("."):
        owner = getattr(owner, part)
    style = owner.adapted(Plain)
    return [_trained_on_rank([], style)] + [_trained_on_rank([factory()], style) for factory in owner.methods]


def _trained_on_rank(methods: list[Method], style: type[Plain]) -> dict[str, Any] | None:
    if any("ddp" not in method.strategies for method in methods):
        return None
    run = fit(methods, style=style, devices=2, strategy="ddp", max_epochs=2)
    return {"weights": dict(run.module.state_dict()), "trace": trace(run.module)}
