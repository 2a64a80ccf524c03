"""What every method does in every kind of project: it works, or it is rejected in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from pairs import CONFIGURATIONS
from project_styles import STYLES
from verdicts import Verdict, WrongError, verdict

import lightning_peft as peft
from lightning_peft import Lane, Method


def own_loss(project: Any, batch: Any) -> Any:
    """A project's loss, with labels: what counts here is the form of its batches; where a step does not tell, any loss."""
    if not project.automatic_optimization:
        return sum(parameter.square().mean() for parameter in project.parameters())
    said = project.training_step(*(batch, 0)[: len(signature(project.training_step).parameters)])
    return said["loss"] if isinstance(said, dict) else said


# What a training of eight steps needs to be told; all others are at their defaults.
SHORT: dict[str, Callable[[Any], Method]] = {
    "ALLoRA": lambda project: peft.ALLoRA(rank=2),
    "AdaLoRA": lambda project: peft.AdaLoRA(rank=2, target=1),
    "BALoRA": lambda project: peft.BALoRA(rank=2),
    "BlockPruning": lambda project: peft.BlockPruning(1, start=2),
    "Bone": lambda project: peft.Bone(rank=1),
    "CoTTA": lambda project: peft.CoTTA(views=2),
    "CorDA": lambda project: peft.CorDA(rank=2, looks=1),
    "DSEE": lambda project: peft.DSEE(rank=1, sparse=8),
    "DoRA": lambda project: peft.DoRA(rank=2),
    "DyLoRA": lambda project: peft.DyLoRA(rank=2),
    "EATA": lambda project: peft.EATA(fisher_alpha=0.0),
    "EVA": lambda project: peft.EVA(rank=2, looks=1),
    "FLoRA": lambda project: peft.FLoRA(rank=2),
    "FOA": lambda project: peft.FOA(source=project.data(), population=3),
    "GroupEnvelope": lambda project: peft.GroupEnvelope(0.5, end=3),
    "HFT": lambda project: peft.HFT(every=3),
    "ISSP": lambda project: peft.ISSP(0.5, end=3),
    "IncreLoRA": lambda project: peft.IncreLoRA(warmup=0, every=1, top=100),
    "KaSA": lambda project: peft.KaSA(rank=1),
    "LAME": lambda project: peft.LAME(neighbours=2),
    "LIFT": lambda project: peft.LIFT(rank=2, every=3),
    "LayerGrowth": lambda project: peft.LayerGrowth(at="step:2", start=1),
    "LoLDU": lambda project: peft.LoLDU(rank=2),
    "LoRA": lambda project: peft.LoRA(rank=2),
    "LoRAGGPO": lambda project: peft.LoRAGGPO(rank=2),
    "LoRASB": lambda project: peft.LoRASB(rank=2, looks=1),
    "LoRAXS": lambda project: peft.LoRAXS(rank=2),
    "MEMO": lambda project: peft.MEMO(views=2),
    "MaskedPruning": lambda project: peft.MaskedPruning(0.5, "taylor", start=1, end=3, every=1),
    "MiSS": lambda project: peft.MiSS(rank=2),
    "MixtureGrowth": lambda project: peft.MixtureGrowth(at="step:2"),
    "NMSparsity": lambda project: peft.NMSparsity("2:4"),
    "NOLA": lambda project: peft.NOLA(rank=2, bases=4),
    "OLoRA": lambda project: peft.OLoRA(rank=2),
    "PEGO": lambda project: peft.PEGO(rank=1, members=2),
    "PHM": lambda project: peft.PHM(terms=1),
    "PeftAdapter": lambda project: peft.PeftAdapter({"peft_type": "LORA", "r": 2}, targets="all-linear"),
    "PiSSA": lambda project: peft.PiSSA(rank=2),
    "RAMT": lambda project: peft.RAMT(0.5),
    "RMT": lambda project: peft.RMT(source=project.data(), warm_up=4),
    "RandLoRA": lambda project: peft.RandLoRA(rank=2, alpha=4),
    "RoTTA": lambda project: peft.RoTTA(capacity=4, every=4),
    "SALT": lambda project: peft.SALT(rank=1, share=0.5),
    "SAP": lambda project: peft.SAP(start=2, end=3, every=1),
    "SORSA": lambda project: peft.SORSA(rank=2),
    "SPT": lambda project: peft.SPT(looks=1),
    "SVFit": lambda project: peft.SVFit(rank=2),
    "SaRA": lambda project: peft.SaRA(threshold=0.02, reselect=2),
    "SelfSupervisedAdapt": lambda project: peft.SelfSupervisedAdapt(own_loss),
    "SoKA": lambda project: peft.SoKA(rank=1),
    "SpIEL": lambda project: peft.SpIEL(every=4, window=2),
    "StageSharing": lambda project: peft.StageSharing([2, 2], at="step:2"),
    "StructuredPruning": lambda project: peft.StructuredPruning(0.2, start=2),
    "TLoRA": lambda project: peft.TLoRA(rank=1),
    "TemporaryForgetting": lambda project: peft.TemporaryForgetting(2, targets="all-linear", exclude=["first"]),
    "TrainedRankPruning": lambda project: peft.TrainedRankPruning(0.5, period=2),
    "TriAdaptLoRA": lambda project: peft.TriAdaptLoRA(target=2, every=1, end=2),
}
METHODS = {name: SHORT.get(name, lambda _, name=name: getattr(peft, name)()) for name in sorted(CONFIGURATIONS)}


def outcome(style: str, method: str) -> Verdict:
    """Train a project with a method, with a validation loader and the sanity check; what adapts is tested afterwards."""
    torch.manual_seed(0)
    module = STYLES[style]()
    return verdict(lambda: trained(module, module.data, METHODS[method](module)))


def trained(module: Any, data: Callable[[], Any], method: Method, others: Iterable[Callback] = (), tests: bool = True) -> None:
    """Train with a validation loader; test then with what adapts.

    Args:
        module: The module.
        data: Makes a loader.
        method: The method.
        others: Callbacks that the module needs.
        tests: Whether the module can be tested.

    Raises:
        WrongError: If weights are not finite afterwards.
    """
    settings: dict[str, Any] = {"max_epochs": 2, "num_sanity_val_steps": 2, "limit_val_batches": 1, "limit_train_batches": 4}
    runner(module, [*others, method], **settings).fit(module, data(), data())
    if method.lane == Lane.ADAPT and tests:
        evaluated(module, data, [method])
    state = module.state_dict()
    if broken := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise WrongError(f"not finite: {', '.join(broken)}")


def evaluated(module: Any, data: Callable[[], Any], callbacks: Iterable[Callback] = ()) -> None:
    """Test a module; validate it where it has no test."""
    if is_overridden("test_step", module):
        runner(module, callbacks).test(module, data(), verbose=False)
    elif is_overridden("validation_step", module):
        runner(module, callbacks).validate(module, data(), verbose=False)


def runner(module: Any, callbacks: Iterable[Callback], **settings: Any) -> Any:
    """A Trainer of the package that a module's class comes from, with a logger that takes everything."""
    package = next(cls for cls in type(module).__mro__ if cls.__name__ == "LightningModule").__module__.split(".core.")[0]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "devices": 1, "logger": DummyLogger(), "num_sanity_val_steps": 0, **quiet}
    return import_module(package).Trainer(callbacks=[*callbacks], **{**defaults, **settings})
