"""What every method does in every kind of project: it works, or it is rejected in words."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from pairs import CONFIGURATIONS
from project_styles import STYLES

import lightning_peft as peft
from lightning_peft import Lane, Method
from lightning_peft.testing.modules import trainer

# What a training of eight steps needs to be told; all others are at their defaults.
SHORT: dict[str, Callable[[], Method]] = {
    "BlockPruning": lambda: peft.BlockPruning(1, start=2),
    "CoTTA": lambda: peft.CoTTA(views=2),
    "EATA": lambda: peft.EATA(fisher_alpha=0.0),
    "GroupEnvelope": lambda: peft.GroupEnvelope(0.5, end=3),
    "ISSP": lambda: peft.ISSP(0.5, end=3),
    "LAME": lambda: peft.LAME(neighbours=2),
    "LayerGrowth": lambda: peft.LayerGrowth(at="step:2", start=1),
    "MEMO": lambda: peft.MEMO(views=2),
    "MaskedPruning": lambda: peft.MaskedPruning(0.5, "taylor", start=1, end=3, every=1),
    "MixtureGrowth": lambda: peft.MixtureGrowth(at="step:2"),
    "NMSparsity": lambda: peft.NMSparsity("2:4"),
    "RoTTA": lambda: peft.RoTTA(capacity=4, every=4),
    "SAP": lambda: peft.SAP(start=2, end=3, every=1),
    "StageSharing": lambda: peft.StageSharing([2, 2], at="step:2"),
    "StructuredPruning": lambda: peft.StructuredPruning(0.2, start=2),
    "TrainedRankPruning": lambda: peft.TrainedRankPruning(0.5, period=2),
}
METHODS = {name: SHORT.get(name, getattr(peft, name)) for name in sorted(CONFIGURATIONS)}

WORKS, REJECTED, BREAKS = "works", "rejected", "breaks"


def outcome(style: str, method: str) -> tuple[str, str]:
    """Train a project with a method, with a validation loader and the sanity check; what adapts is tested afterwards.

    Returns:
        One of :data:`WORKS`, :data:`REJECTED`, :data:`BREAKS`, and the words of what was raised.
    """
    torch.manual_seed(0)
    module = STYLES[style]()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _run(module, METHODS[method])
    except MisconfigurationException as error:
        ours = any("lightning_peft" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[-2:])
        return (REJECTED if ours else BREAKS), str(error)
    except Exception as error:
        return BREAKS, f"{type(error).__name__}: {error}"
    broken = [name for name, value in module.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
    return (BREAKS, f"not finite: {', '.join(broken)}") if broken else (WORKS, "")


def _run(module: Any, make: Callable[[], Method]) -> None:
    method = make()
    settings: dict[str, Any] = {"max_epochs": 2, "num_sanity_val_steps": 2, "limit_val_batches": 1}
    trainer(callbacks=[method], **settings).fit(module, module.data(), module.data())
    if method.lane == Lane.ADAPT:
        runner: Trainer = trainer(callbacks=[method])
        runner.test(module, module.data(), verbose=False)
