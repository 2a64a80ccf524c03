"""Callbacks of other libraries that cannot work on one module with some methods: refused before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

from lightning_peft.compose.lanes import Resource
from lightning_peft.contract import Contract
from lightning_peft.namespaces import both


def check_neighbours(trainer: Trainer, methods: Sequence[Contract], module: LightningModule) -> None:
    """Refuse callbacks that would overwrite what a method does, or be left behind by it.

    Args:
        trainer: The Trainer.
        methods: Its methods.
        module: The module, still plain.

    Raises:
        MisconfigurationException: Names both, and what to do.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, both(ModelPruning)):
            for method in methods:
                _check_pruning(callback, method, module)
        if _is_finetuning_scheduler(callback) and trainer.state.fn == "fit":
            _check_schedule(callback, methods)


def _check_pruning(pruning: Any, method: Contract, module: nn.Module) -> None:
    """Torch's pruning takes ``weight`` out of a layer and puts another tensor of that name in its place."""
    if Resource.STRUCTURE in method.writes_now():
        raise MisconfigurationException(
            f"{method.name} changes the structure of the network, and Lightning's ModelPruning holds on to the layers it had. "
            "Remove ModelPruning, or prune with MaskedPruning, which follows the change."
        )
    if not method.weight_maps and Resource.GRADIENT not in method.writes_now():
        return
    does, instead = "gives a gradient", "Give"
    if method.weight_maps:
        does, instead = "maps", f"Prune with MaskedPruning, which works beside {method.name}; or give"
    pruned = {(id(layer), name) for layer, name in pruning._parameters_to_prune}
    for tensor in method.claims(module):
        path, _, name = tensor.rpartition(".")
        if (id(module.get_submodule(path)), name) in pruned:
            raise MisconfigurationException(
                f"Lightning's ModelPruning replaces {tensor}, which {method.name} {does}. {instead} each its own layers: "
                f"parameters_to_prune=[(layer, {name!r}), ...] in ModelPruning, exclude=[{path!r}, ...] in {method.name}."
            )


def _is_finetuning_scheduler(callback: object) -> bool:
    return any(cls.__name__ == "FinetuningScheduler" for cls in type(callback).__mro__)


def _check_schedule(callback: object, methods: Iterable[Contract]) -> None:
    for method in methods:
        if Resource.STRUCTURE in method.writes_now():
            raise MisconfigurationException(
                f"{method.name} changes the parameters that the schedule of {type(callback).__name__} names, so checkpoints "
                f"could not be resumed. Train with {method.name} first, without it; then finetune the module that fit left "
                "behind, or lightning_peft.load_from_checkpoint(ModelClass, path), in another Trainer."
            )
