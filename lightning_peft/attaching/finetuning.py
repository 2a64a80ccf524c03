"""Lightning's finetuning callbacks, which keep the groups of optimizers by the names of their parameters, for a resume."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning

from lightning_peft.namespaces import both
from lightning_peft.optim.optimizers import parameter_names


def follow_edit(trainer: Trainer, module: LightningModule) -> None:
    """Let finetuning callbacks know the groups as they are after an edit; they only ever add to what they noted first.

    Args:
        trainer: The Trainer, its optimizers edited.
        module: The module, edited.
    """
    names = parameter_names(module)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, both(BaseFinetuning)):
            for index in callback._internal_optimizer_metadata:
                groups = trainer.optimizers[index].param_groups
                callback._internal_optimizer_metadata[index] = callback._apply_mapping_to_param_groups(groups, names)
