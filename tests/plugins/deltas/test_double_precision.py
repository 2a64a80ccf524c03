"""Deltas of float64 weights are float64, and come back from files as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_peft
from lightning_peft import LoRA, NMSparsity
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, loader, mlp, trainer


class Double(Plain):
    def build(self) -> None:
        torch.manual_seed(0)
        self.model = mlp().double()

    def base_loss(self, batch: Any) -> Tensor:
        return super().base_loss([batch[0].double(), batch[1]])


@pytest.mark.parametrize("masked", [False, True], ids=["beside the layer", "on the weight"])
@pytest.mark.parametrize("keep", [False, True])
def test_files_keep_the_precision(tmp_path: Path, masked: bool, keep: bool) -> None:
    targets = {"targets": ["model.0", "model.2"], "exclude": ()}
    lora = LoRA(2, alpha=8, keep=keep and not masked, **targets)  # type: ignore[arg-type]
    methods = [lora, *([NMSparsity("2:4", **targets)] if masked else [])]  # type: ignore[arg-type]
    module = Double()
    trainer(callbacks=[*methods, every_epoch(tmp_path)], max_epochs=2).fit(module, loader(), loader(8))
    path = tmp_path / "epoch=1.ckpt"
    loaded = lightning_peft.load_from_checkpoint(Double, path)
    baked = lightning_peft.bake(lightning_peft.load_from_checkpoint(Double, path))
    inputs = torch.randn(4, 16, dtype=torch.float64)
    for other in (loaded, baked):
        torch.testing.assert_close(other(inputs), module(inputs), rtol=0, atol=1e-13)
