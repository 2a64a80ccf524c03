"""Checks that a checkpoint of the middle of a training is evaluated as that training was."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import lightning_peft
from lightning_peft.testing.modules import loader, trainer
from lightning_peft.testing.runs import Fit
from lightning_peft.testing.shared_runs import EPOCHS, Answers, Factory, SharedRuns, answers_of
from lightning_peft.testing.trace import difference


class Asked(Callback):
    """Keeps what a module answers in a test, whatever its own step makes of it."""

    answer: Tensor

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any) -> None:
        self.answer = Answers.of(pl_module)


class EvaluationChecks(SharedRuns):
    """Evaluation from a checkpoint, with the method and without it."""

    no_exact_bake: ClassVar[str] = ""

    # The callbacks that saved the file are not needed to evaluate it.
    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
    def test_a_checkpoint_answers_as_its_training_did(self, factory: Factory, reference: Fit, folder: Path) -> None:
        seen = answers_of(reference).by_epoch
        assert list(seen) == list(range(EPOCHS))
        for epoch in range(EPOCHS - 1):
            path, asked = folder / f"epoch={epoch}.ckpt", Asked()
            trainer(callbacks=[factory(), asked]).test(
                self.style(), loader(8), ckpt_path=path, verbose=False, weights_only=True
            )
            found = difference(seen[epoch], asked.answer)
            assert found is None, f"trainer.test(ckpt_path={path.name!r}) against the validation of that epoch: {found}"

    def test_a_baked_checkpoint_answers_as_its_training_did(self, reference: Fit, folder: Path) -> None:
        if self.no_exact_bake:
            return
        for epoch, seen in list(answers_of(reference).by_epoch.items())[:-1]:
            loaded = lightning_peft.load_from_checkpoint(self.style, folder / f"epoch={epoch}.ckpt")
            error = (Answers.of(loaded) - seen).abs().max().item()
            assert error <= self.tolerance, (
                f"load_from_checkpoint of epoch={epoch}.ckpt against the validation of that epoch: they differ by {error:.3g}"
            )
