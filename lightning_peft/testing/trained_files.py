"""The check of files that hold only what was trained, with a frozen layer and trainable parts beside the method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.method import Method
from lightning_peft.structure.checkpoint import KEY
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import assert_same
from lightning_peft.testing.shared_runs import EPOCHS, Factory, SharedRuns
from lightning_peft.testing.toys import GatePart, ToyGate


class Frozen(Plain):
    """Its first layer is not trained."""

    def build(self) -> None:
        super().build()
        self.model[0].requires_grad_(False)


class TrainedFileChecks(SharedRuns):
    """One training of the first configuration, as those have it who train parts beside a frozen base, and its resume."""

    no_part: ClassVar[str] = ""

    def test_resumes_from_what_was_trained(self, lead: Factory, tmp_path: Path) -> None:
        def methods() -> list[Method]:
            return [lead(), ToyGate("trained")]

        style = self._adapted(Frozen)
        if self.no_part:
            with pytest.raises(MisconfigurationException, match=re.compile(self.no_part, re.DOTALL)):
                self._fit(methods(), style=style, max_epochs=EPOCHS)
            return
        whole = self._fit(methods(), style=style, after=[every_epoch(tmp_path)], max_epochs=EPOCHS)
        first, second = (torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)[KEY] for epoch in (0, 1))
        assert "model.0.bias" in first["base"], "a file of what was trained holds a parameter that was not: model.0.bias"
        gates, later = gates_of(first), gates_of(second)
        assert gates, "the parts beside the method are in no file"
        still = [name for name in gates.keys() & later if torch.equal(gates[name], later[name])]
        assert not still, f"parts beside the method that nobody trains: {still}"
        resumed = self._fit(methods(), style=style, resume=tmp_path / "epoch=1.ckpt", max_epochs=EPOCHS)
        assert_same(whole, resumed, "uninterrupted against resumed from a file of what was trained")


def gates_of(section: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of :class:`~lightning_peft.testing.toys.ToyGate` in the library's part of a checkpoint, by layer."""
    parts = [(path, part) for path, stack in section.get("parts", {}).items() for part in stack]
    return {path: part["state"]["gate"] for path, part in parts if part["part"] == GatePart.kind}
