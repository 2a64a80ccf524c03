"""What every method does in every kind of project: it works, or it is rejected in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from pairs import CONFIGURATIONS
from project_styles import STYLES
from verdicts import Verdict, WrongError, verdict

import lightning_peft as peft
from lightning_peft import Lane, Method
from lightning_peft.testing.modules import trainer


def own_loss(project: Any, batch: Any) -> Any:
    """A project's loss, with labels: what counts here is the form of its batches."""
    return project.model_step(batch)[0] if hasattr(project, "model_step") else project.step(batch)


# What a training of eight steps needs to be told; all others are at their defaults.
SHORT: dict[str, Callable[[Any], Method]] = {
    "BlockPruning": lambda project: peft.BlockPruning(1, start=2),
    "CoTTA": lambda project: peft.CoTTA(views=2),
    "EATA": lambda project: peft.EATA(fisher_alpha=0.0),
    "FOA": lambda project: peft.FOA(source=project.data(), population=3),
    "GroupEnvelope": lambda project: peft.GroupEnvelope(0.5, end=3),
    "ISSP": lambda project: peft.ISSP(0.5, end=3),
    "LAME": lambda project: peft.LAME(neighbours=2),
    "LayerGrowth": lambda project: peft.LayerGrowth(at="step:2", start=1),
    "MEMO": lambda project: peft.MEMO(views=2),
    "MaskedPruning": lambda project: peft.MaskedPruning(0.5, "taylor", start=1, end=3, every=1),
    "MixtureGrowth": lambda project: peft.MixtureGrowth(at="step:2"),
    "NMSparsity": lambda project: peft.NMSparsity("2:4"),
    "RMT": lambda project: peft.RMT(source=project.data(), warm_up=4),
    "RoTTA": lambda project: peft.RoTTA(capacity=4, every=4),
    "SAP": lambda project: peft.SAP(start=2, end=3, every=1),
    "SelfSupervisedAdapt": lambda project: peft.SelfSupervisedAdapt(own_loss),
    "StageSharing": lambda project: peft.StageSharing([2, 2], at="step:2"),
    "StructuredPruning": lambda project: peft.StructuredPruning(0.2, start=2),
    "TrainedRankPruning": lambda project: peft.TrainedRankPruning(0.5, period=2),
}
METHODS = {name: SHORT.get(name, lambda _, name=name: getattr(peft, name)()) for name in sorted(CONFIGURATIONS)}


def outcome(style: str, method: str) -> Verdict:
    """Train a project with a method, with a validation loader and the sanity check; what adapts is tested afterwards."""
    torch.manual_seed(0)
    module = STYLES[style]()
    return verdict(lambda: _run(module, METHODS[method]))


def _run(module: Any, make: Callable[[Any], Method]) -> None:
    method = make(module)
    settings: dict[str, Any] = {"max_epochs": 2, "num_sanity_val_steps": 2, "limit_val_batches": 1}
    trainer(callbacks=[method], **settings).fit(module, module.data(), module.data())
    if method.lane == Lane.ADAPT:
        runner: Trainer = trainer(callbacks=[method])
        runner.test(module, module.data(), verbose=False)
    state = module.state_dict()
    if broken := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise WrongError(f"not finite: {', '.join(broken)}")
