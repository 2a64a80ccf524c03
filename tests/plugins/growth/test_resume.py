"""Growing trainings that are interrupted go on bit for bit, whatever optimizes them."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from growth_toys import Deep, blocks, grow
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.optim import lr_scheduler as schedules
from warm_python import python

from lightning_peft import LayerGrowth, NMSparsity, WeightCompander
from lightning_peft.testing.callbacks import FailAt, PlannedError, every_epoch
from lightning_peft.testing.modules import Plain, deepened, loader, trainer
from lightning_peft.testing.runs import Fit, assert_same

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
}
SCHEDULES = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one-cycle": lambda o: schedules.OneCycleLR(o, 0.05, total_steps=100),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 12),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.CosineAnnealingLR(o, 9)], [3]
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
}
VARIED = ["adamw", "sgd-momentum", "adafactor"]
EVERY_SCHEDULE = [
    *((name, "restart") for name in SCHEDULES),
    *itertools.product(["cosine", "sequential"], ["continue", "rewarm:3@0.5"]),
]


def module_with(optimizer: Any, scheduler: Any = None, style: type[Plain] = Plain) -> type[Plain]:
    """A deep module with a certain optimizer, matrices and vectors in groups of their own, and a schedule by step."""

    class Optimized(deepened(style)):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            parameters = list(self.parameters())
            groups = [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
                {"params": [p for p in parameters if p.ndim <= 1]},
            ]
            made = optimizer(groups if _decays(optimizer) else parameters)
            if scheduler is None:
                return made
            config = {"scheduler": scheduler(made), "interval": "step", "monitor": "loss", "strict": False}
            return {"optimizer": made, "lr_scheduler": config}

    return Optimized


def _decays(optimizer: Any) -> bool:
    return "weight_decay" in optimizer([torch.zeros(1, requires_grad=True)]).defaults


def check_resume(make: Any, folder: Path, *, style: type[Plain] = Deep, **settings: Any) -> Fit:
    """Train whole, then from every epoch's checkpoint: before, between and after growth."""
    averaged = settings.pop("averaged", False)

    def before() -> dict[str, Any]:
        return {"before": [EMAWeightAveraging(decay=0.5)]} if averaged else {}

    whole = grow(make(), style=style, after=[every_epoch(folder)], **before(), **settings)
    for epoch in range(2):
        resumed = grow(make(), style=style, seed=epoch + 9, resume=folder / f"epoch={epoch}.ckpt", **before(), **settings)
        assert_same(whole, resumed, f"uninterrupted against resumed after epoch {epoch}")
    return whole


def twice(rule: str = "copy", **arguments: Any) -> Any:
    """Growth in the middle of the second epoch and at the start of the third."""
    return lambda: [LayerGrowth(at=["step:6", "epoch:2"], start=1, to=[2, 4], optimizer_state=rule, **arguments)]


EVERY_OPTIMIZER = [*((name, "pad") for name in OPTIMIZERS), *itertools.product(VARIED, ["reset", "copy"])]
"""The rule that has to know most of an optimizer with each of them, the others with one of each shape of state."""


@pytest.mark.parametrize(("optimizer", "rule"), EVERY_OPTIMIZER)
def test_every_optimizer(optimizer: str, rule: str, tmp_path: Path) -> None:
    run = check_resume(twice(rule), tmp_path, style=module_with(OPTIMIZERS[optimizer]))
    assert blocks(run) == 4


@pytest.mark.parametrize(("scheduler", "lr"), EVERY_SCHEDULE)
def test_every_schedule(scheduler: str, lr: str, tmp_path: Path) -> None:
    style = module_with(OPTIMIZERS["sgd-momentum"], SCHEDULES[scheduler])
    run = check_resume(twice("pad", lr=lr), tmp_path, style=style)
    assert blocks(run) == 4


def test_accumulation(tmp_path: Path) -> None:
    run = check_resume(lambda: [LayerGrowth(at=["step:3", "step:5"], start=1, to=[2, 4])], tmp_path, accumulate_grad_batches=2)
    assert blocks(run) == 4


def test_bf16(tmp_path: Path) -> None:
    check_resume(twice(), tmp_path, precision="bf16-mixed")


@pytest.mark.parametrize("operator", ["stack", "zero"])
def test_averaging(operator: str, tmp_path: Path) -> None:
    check_resume(lambda: [LayerGrowth(operator, at="step:6", start=2)], tmp_path, averaged=True)


def test_with_masks_and_maps(tmp_path: Path) -> None:
    def methods() -> Any:
        return [NMSparsity("2:4"), WeightCompander(), *twice()()]

    check_resume(methods, tmp_path, averaged=True)


def test_new_blocks_can_stay_plain(tmp_path: Path) -> None:
    run = check_resume(lambda: [NMSparsity("2:4", exclude=()), *twice(follow="none")()], tmp_path)
    dense = [name for name, weight in run.module.named_parameters() if name.endswith("fc1.weight") and (weight != 0).all()]
    assert dense == [f"blocks.{place}.fc1.weight" for place in (1, 2, 3)]


def test_a_file_saved_after_a_fit_that_failed_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    runner = trainer(callbacks=[LayerGrowth(at="step:6", start=2), FailAt(8)], max_epochs=3)
    with pytest.raises(PlannedError):
        runner.fit(Deep(), loader(), loader(8))
    runner.save_checkpoint(tmp_path / "failed.ckpt")
    whole = grow([LayerGrowth(at="step:6", start=2)])
    resumed = grow([LayerGrowth(at="step:6", start=2)], seed=3, resume=tmp_path / "failed.ckpt")
    assert_same(whole, resumed, "uninterrupted against resumed from a file saved after the fit had failed")


def test_killed_in_the_middle_of_an_edit(tmp_path: Path) -> None:
    code = f"from growth_toys import train_killed; train_killed({str(tmp_path)!r}, at=6)"
    here = Path(__file__).parent
    alike = os.environ | {"OMP_NUM_THREADS": "1"}  # sums of as many threads as in this process
    done = python("-c", code, cwd=here, env=alike)
    assert done.returncode == -9, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]
    resumed = grow([LayerGrowth(at="step:6", start=2)], seed=3, resume=tmp_path / "epoch=0.ckpt")
    assert_same(grow([LayerGrowth(at="step:6", start=2)]), resumed, "uninterrupted against killed and resumed")
