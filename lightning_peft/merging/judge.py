"""What a state dict is worth to a module on its own validation data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.capture.nested_trainer import quiet_trainer, trainers_kept
from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.opening import open_model
from lightning_peft.merging.statistics import estimate_again, running_norms
from lightning_peft.namespaces import both


def state_of(module: LightningModule) -> dict[str, Any]:
    """Return a copy of a module's state dict."""
    return {name: value.detach().clone() if hasattr(value, "detach") else value for name, value in module.state_dict().items()}


def _shape(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(tuple(shape))


class Judge:
    """Validates state dicts when a fit is over, each process by itself on all of the data.

    Args:
        trainer: The Trainer of the fit, which has been torn down.
        module: The module; it holds afterwards what was validated last.
        monitor: The metric that counts.
        norm_batches: Training batches that batch norms are estimated from.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, monitor: str, norm_batches: int) -> None:
        self.module, self._monitor, self._fit = module, monitor, trainer
        self._norm_batches = norm_batches if running_norms(module) and self._can_estimate() else 0

    def alone(self, path: str) -> float:
        """Return what a checkpoint is worth as it is.

        Raises:
            MergeError: ``validation_step`` does not log the metric.
        """
        model = open_model(path)
        self._load({name: model.value(name) for name in model.tensors})
        return self._validated()

    def __call__(self, state: Mapping[str, Any]) -> float:
        """Return what a merged model is worth, its batch norms estimated again.

        Raises:
            MergeError: ``validation_step`` does not log the metric.
        """
        self.ready(state)
        return self._validated()

    def ready(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a merged model with its batch norms estimated again."""
        self._load(state)
        if self._norm_batches:
            trainer = self._trainer(limit_val_batches=self._norm_batches)
            with isolate_rng():
                estimate_again(self.module, trainer, self._training_data())
        return state_of(self.module)

    def _trainer(self, limit_val_batches: float) -> Trainer:
        """Make a Trainer on the device of the fit; a strategy belongs to one."""
        strategy = SingleDeviceStrategy(self._fit.strategy.root_device)
        accelerator, precision = self._fit.accelerator, self._fit.precision
        return quiet_trainer(
            strategy=strategy, accelerator=accelerator, precision=precision, limit_val_batches=limit_val_batches
        )

    def _load(self, state: Mapping[str, Any]) -> None:
        own = {name: value.shape for name, value in self.module.state_dict().items() if isinstance(value, Tensor)}
        found = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
        if odd := next((name for name in {**own, **found} if own.get(name) != found.get(name)), None):
            raise MergeError(
                f"The module has changed since its best checkpoints: {odd} is {_shape(own.get(odd))} now and "
                f"{_shape(found.get(odd))} in them. Keep checkpoints of the last structure alone: a ModelCheckpoint whose "
                "metric counts from then on."
            )
        self.module.load_state_dict(dict(state), strict=False)  # what is no tensor is the module's own

    def _validated(self) -> float:
        trainer = self._trainer(limit_val_batches=self._fit.limit_val_batches)
        data = self._fit.datamodule  # type: ignore[attr-defined]
        with trainers_kept(self.module), isolate_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            trainer.validate(self.module, **self._validation_data(), verbose=False)
        if data is not None:
            data.trainer = self._fit
        if (found := trainer.callback_metrics.get(self._monitor)) is None:
            raise MergeError(
                f"It judges by {self._monitor!r}, which validation_step did not log. Monitor a metric of validation in "
                f"ModelCheckpoint: it logs {', '.join(trainer.callback_metrics) or 'none'}."
            )
        return float(found)

    def _validation_data(self) -> dict[str, Any]:
        source = self._fit.fit_loop.epoch_loop.val_loop._data_source.instance
        if isinstance(source, both(LightningDataModule)):
            return {"datamodule": source}
        return {} if isinstance(source, both(LightningModule)) else {"dataloaders": source}

    def _training_data(self) -> Any:
        return self._fit.train_dataloader

    def _can_estimate(self) -> bool:
        """Whether the training step can run on training batches in an evaluation loop."""
        if self.module.automatic_optimization and isinstance(self._training_data(), DataLoader):
            return True
        rank_zero_warn(
            "MergeAtEnd averages the running statistics of batch norms, which are not those of the merged network: with manual "
            "optimization, or several training loaders, it cannot estimate them. torch.optim.swa_utils.update_bn does."
        )
        return False
