"""A delta beside an average of the weights that is resumed, and under a gradient scaler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_peft import LoRA
from lightning_peft.testing.modules import Plain, loader, trainer

BATCHES = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_file_of_a_fit_that_is_over_is_trained_on_beside_its_average(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        module = Plain()
        runner = trainer(callbacks=[LoRA(2, checkpoint="full"), EMAWeightAveraging(decay=0.5)], max_epochs=epochs)
        runner.fit(module, loader(), loader(8), ckpt_path=resume)
        return runner, module

    runner, module = run(2)
    ended = {key: value.clone() for key, value in module.state_dict().items()}
    runner.save_checkpoint(tmp_path / "ended.ckpt")
    _, after = run(3, tmp_path / "ended.ckpt")
    assert any(not torch.equal(value, ended[key]) for key, value in after.state_dict().items())
    assert all(value.isfinite().all() for value in after.state_dict().values())


class TwoOptimizers(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.head(self.body(batch)).square().mean()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]


def test_an_optimizer_with_nothing_to_train_is_refused_under_a_scaler_and_the_advice_works() -> None:
    def fit(method: LoRA, *, scaled: bool = True) -> None:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")) if scaled else None  # type: ignore[attr-defined]
        settings = {"plugins": [plugin]} if scaled else {"precision": "bf16-mixed"}
        trainer(callbacks=[method], max_epochs=1, **settings).fit(TwoOptimizers(), BATCHES)  # type: ignore[arg-type]

    with pytest.raises(MisconfigurationException, match="leave optimizer 1 nothing to train"):
        fit(LoRA(2, targets=["body"]))
    fit(LoRA(2, targets=["body"]), scaled=False)
    fit(LoRA(2, targets=["body"], tune=("head",)))
