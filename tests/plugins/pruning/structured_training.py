"""Trainings with cuts, which several tests and a killed process share."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft import StructuredPruning
from lightning_peft.method import Method
from lightning_peft.structure import edits
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Conv
from lightning_peft.testing.runs import Fit, fit


def prune(methods: list[Method], **settings: Any) -> Fit:
    """Three epochs of four steps."""
    return fit(methods, **{"style": Conv, "max_epochs": 3, **settings})


def twice(score: str = "magnitude") -> StructuredPruning:
    """Cuts in the middle of the second epoch and at the start of the third; the schedule begins with nothing."""
    return StructuredPruning(0.5, score, start=4, end=8, every=2, shape="linear")


def train_killed(folder: str, at: int) -> None:
    """Train with a checkpoint every epoch; end the process as ``kill -9`` does, in the middle of an edit."""
    original = edits.apply

    def killed(module: nn.Module, edit: dict[str, Any]) -> edits.Change:
        change = original(module, edit)
        if edit.get("step") == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return change

    edits.apply = killed
    prune([twice("taylor")], after=[every_epoch(Path(folder))])
