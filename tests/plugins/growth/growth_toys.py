"""Runs of growing networks that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft.method import Method
from lightning_peft.testing.modules import Plain, deepened
from lightning_peft.testing.runs import Fit, fit

Deep = deepened(Plain)


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything a module holds."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def grow(methods: list[Method], *, style: type[Plain] = Deep, **settings: Any) -> Fit:
    """Three epochs of four steps."""
    return fit(methods, style=style, **{"max_epochs": 3, **settings})


def blocks(run: Fit) -> int:
    return len(run.module.blocks)


def train_killed(folder: str, at: int) -> None:
    """Train with a checkpoint every epoch; end the process as ``kill -9`` does, in the middle of an edit."""
    import os
    import signal

    from lightning_peft import LayerGrowth
    from lightning_peft.structure import edits
    from lightning_peft.testing.callbacks import every_epoch

    original = edits.apply

    def killed(module: nn.Module, edit: dict[str, Any]) -> edits.Change:
        change = original(module, edit)
        if edit.get("step") == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return change

    edits.apply = killed
    grow([LayerGrowth(at=f"step:{at}", start=2)], after=[every_epoch(Path(folder))])
