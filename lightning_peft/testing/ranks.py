"""Runs of a tester in each of two processes."""

from __future__ import annotations

import copy
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.method import Method
from lightning_peft.testing.ddp import load_module
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft.testing.trace import difference, trace


def train_on_rank(source: str, module: str, tester: str) -> list[Any]:
    """Train every configuration of a tester as one rank of a group, after a module without methods."""
    owner = _owner(source, module, tester)
    style = owner.adapted(Plain)
    return [_trained_on_rank([], style)] + [_trained_on_rank([factory()], style) for factory in owner.methods]


def adapt_on_rank(source: str, module: str, tester: str) -> list[Any]:
    """Test a module with every configuration of a tester as one rank of a group."""
    from lightning_peft.testing.adaptation import answers, built  # which needs pytest

    found: list[Any] = []
    owner = _owner(source, module, tester)
    for factory in owner.methods:
        tested = built(owner.styles[0])
        before = copy.deepcopy(tested.state_dict())
        try:
            logits = answers(tested, [factory()], devices=2, strategy="ddp")
        except MisconfigurationException as error:
            found.append(str(error))
        else:
            found.append({"answers": logits, "changed": difference(dict(before), dict(tested.state_dict()))})
    return found


def _owner(source: str, module: str, tester: str) -> Any:
    """The tester, found in its file again."""
    try:
        owner: Any = load_module(module)
    except ImportError:
        owner = load_module(source)
    for part in tester.split("."):
        owner = getattr(owner, part)
    return owner


def _trained_on_rank(methods: list[Method], style: type[Plain]) -> dict[str, Any] | None:
    if any("ddp" not in method.strategies for method in methods):
        return None
    run = fit(methods, style=style, devices=2, strategy="ddp", max_epochs=2)
    return {"weights": dict(run.module.state_dict()), "trace": trace(run.module)}
