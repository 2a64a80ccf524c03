"""Where the parameters of weight maps and layer parts are trained: with the weight they belong to."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch import nn

from lightning_peft.compose.lanes import Lane
from lightning_peft.compose.run import Run
from lightning_peft.optim.optimizers import place_parameters
from lightning_peft.weights.attachment import Attachment
from lightning_peft.weights.maps import MappedTensor, mapped_tensors
from lightning_peft.weights.parts import placed_parts


def place_maps(trainer: Trainer, mapped: MappedTensor) -> None:
    """Let the parameters of the maps on one tensor be trained beside its stored value, by the settings of each map."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for weight_map in mapped.maps:
        parameters = dict(weight_map.named_parameters(f"{mapped.name}.{weight_map.kind}"))
        settings = (weight_map.optimizer_overrides, weight_map.lr_scale)
        place_parameters(trainer.optimizers, schedulers, parameters, mapped.stored, *settings)
        _place_faster(trainer, weight_map, f"{mapped.name}.{weight_map.kind}")


def place_parts(trainer: Trainer, module: nn.Module) -> None:
    """Let the parameters of every layer part be trained beside its layer, by the settings of the part."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for placed in placed_parts(module):
        parameters = dict(placed.part.named_parameters(placed.name))
        sibling = placed.sibling
        if sibling is None:  # beside an activation, say: like the module's first parameter
            sibling = next(iter(trainer.optimizers[0].param_groups[0]["params"]), None) if trainer.optimizers else None
        if parameters and sibling is not None:
            part = placed.part
            place_parameters(trainer.optimizers, schedulers, parameters, sibling, part.optimizer_overrides, part.lr_scale)
        _place_faster(trainer, placed.part, placed.name)


def _place_faster(trainer: Trainer, attachment: Attachment, prefix: str) -> None:
    """Give parameters of an attachment a multiple of the learning rate of others of it."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for name, (other, factor) in attachment.faster.items():
        one = {f"{prefix}.{name}": attachment.get_parameter(name)}
        place_parameters(trainer.optimizers, schedulers, one, attachment.get_parameter(other), {}, factor)


class MapGroups:
    """Gives the parameters of weight maps and layer parts their groups; follows callbacks that add groups in a training.

    Args:
        run: The fit.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._counts: list[int] = []

    def place(self) -> None:
        """Place every map's own parameters beside the stored value of its tensor, and those of parts beside their layer's."""
        for mapped in mapped_tensors(self._run.module):
            place_maps(self._run.trainer, mapped)
        place_parts(self._run.trainer, self._run.module)
        self._counts = self._count()

    def follow(self) -> None:
        """Train the maps of weights that somebody, a finetuning callback for instance, has just begun to train."""
        if self._count() == self._counts:
            return
        for mapped in mapped_tensors(self._run.module):
            for weight_map in mapped.maps:
                if weight_map.lane == Lane.REPARAM and mapped.stored.requires_grad:
                    weight_map.requires_grad_(True)
        self.place()

    def _count(self) -> list[int]:
        return [len(optimizer.param_groups) for optimizer in self._run.trainer.optimizers]
