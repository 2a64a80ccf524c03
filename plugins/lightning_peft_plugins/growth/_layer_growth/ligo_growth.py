"""LiGO within a fit: the operator is learnt on training batches at the moment of growth, by the user's own training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call

from lightning_peft import Run
from lightning_peft.attaching.missing_blocks import FAILURES, no_chain
from lightning_peft.capture.once_more import silent
from lightning_peft.capture.step_calls import bound_step
from lightning_peft.compose.loss import split_output
from lightning_peft.structure.edits import Edit
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft_plugins.growth._layer_growth.ligo_training import LigoOperator, materialised, train_operator


class LearntOperator:
    """A growth operator that is learnt when it is first called, on the module as it has just become.

    Later calls, for averaged copies of the module, use what was learnt.

    Args:
        run: The run.
        steps: Steps of learning, a batch each.
        lr: Learning rate of the operator.

    Raises:
        MisconfigurationException: The module optimizes by hand, or weight maps stand between its weights and the operator.
    """

    def __init__(self, run: Run, steps: int, lr: float) -> None:
        self._run, self._steps, self._lr = run, steps, lr
        self._operator: LigoOperator | None = None
        if not run.module.automatic_optimization:
            raise MisconfigurationException(
                "LiGO learns by calling training_step, which in a module with manual optimization takes optimizer steps "
                "itself. Choose another operator."
            )
        if mapped := next(mapped_tensors(run.module), None):
            raise MisconfigurationException(
                f"LiGO learns plain weights; {mapped.name} is under the weight map of {mapped.maps[0].owner}. Choose another "
                "operator, or leave that method out."
            )

    def __call__(self, values: Mapping[str, Tensor], edit: Edit, generator: torch.Generator) -> dict[str, Tensor]:
        """Values after an edit."""
        if self._operator is None:
            self._check_untied(edit)
            strategy = self._run.trainer.strategy
            with torch.random.fork_rng(), silent(self._run.module):
                torch.manual_seed(generator.initial_seed())  # batches and dropout: the training's own draws go on untouched
                try:
                    self._operator = train_operator(
                        values,
                        [edit],
                        self._losses(),
                        self._steps,
                        self._lr,
                        generator,
                        reduce=lambda gradient: strategy.reduce(gradient, reduce_op="mean"),
                    )
                except FAILURES as error:
                    if edit["op"] != "blocks" or type(error) not in FAILURES:
                        raise
                    raise MisconfigurationException(no_chain(edit, error)) from error
        with torch.no_grad():
            return materialised(values, [edit], self._operator)

    def _check_untied(self, edit: Edit) -> None:
        """Refuse blocks that share a tensor with another part: it would be learnt once for each name."""
        first: dict[int, str] = {}
        for name, tensor in self._run.module.named_parameters(remove_duplicate=False):
            other = first.setdefault(id(tensor), name)
            if other != name and edit["op"] == "blocks" and name.startswith(f"{edit['path']}."):
                raise MisconfigurationException(
                    f"{other} and {name} are one tensor, which LiGO would learn twice. Choose another operator."
                )

    def _losses(self) -> Any:
        trainer, module = self._run.trainer, self._run.module
        batches = self._batches()
        step = _Step(module)
        buffers = {name for name, _ in module.named_buffers()}  # running statistics follow, and teach nothing

        def loss_of(values: dict[str, Tensor], index: int) -> Tensor:
            batch = trainer.strategy.batch_to_device(next(batches))
            with trainer.precision_plugin.train_step_context():
                given = {f"module.{name}": value.detach() if name in buffers else value for name, value in values.items()}
                output = functional_call(step, given, (batch, index))
            return split_output(output)

        return loss_of

    def _batches(self) -> Iterator[Any]:
        while True:
            yield from self._run.trainer.train_dataloader


class _Step(nn.Module):
    """The module's own training step as a forward pass."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any, index: int) -> Any:
        return bound_step(self.module, "training_step", batch, index)()
