"""What a Trainer is asked for, one feature each: lengths, precisions, ways of optimising, callbacks, loggers, switches."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pairs import CLASSES, Network, data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.attaching.hub import apply_terms

Made = Callable[[Any, Path], Any]


@dataclass(frozen=True)
class Feature:
    """One thing that a training is asked for.

    Attributes:
        name: What it is called, as users write it.
        factor: What it is a choice of; one choice of each factor makes a training.
        settings: Arguments of the Trainer, from the namespace of Lightning and a folder.
        callbacks: Callbacks, from the same.
        subject: Attributes of the module that choose how it is written.
    """

    name: str
    factor: str
    settings: Made = field(default=lambda pl, folder: {})
    callbacks: Made = field(default=lambda pl, folder: [])
    subject: dict[str, str] = field(default_factory=dict)


class Stream(IterableDataset[Any]):
    """The samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(data())


class Steps:
    """What a small classifier does that is written in the way its attributes say; a module of either namespace."""

    def __init__(self, **ways: str) -> None:
        super().__init__()
        self.network = Network()
        self.ways = {"steps": "automatic", "logs": "values", "schedule": "", "loader": "", **ways}
        self.batch_size, self.lr = 4, 0.1
        self.accuracy, self.mean = MulticlassAccuracy(CLASSES), MeanMetric()
        self.automatic_optimization = self.ways["steps"] not in ("manual", "two optimizers", "accumulating by hand")

    @property
    def backbone(self) -> nn.Module:
        return self.network.blocks

    def forward(self, images: Tensor) -> Any:
        return self.network(images)

    def _loss(self, batch: Any, prefix: str) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        if self.ways["logs"] == "metrics":
            self.accuracy(logits, batch[1])
            self.mean(loss.detach())
            self.log(f"{prefix}acc", self.accuracy, on_step=False, on_epoch=True)
            self.log(f"{prefix}loss", self.mean, on_step=True, on_epoch=True)
        elif self.ways["logs"] == "dict":
            self.log_dict({f"{prefix}loss": loss, f"{prefix}twice": 2 * loss}, prog_bar=True, sync_dist=True)
        elif self.ways["logs"] == "values":
            self.log(f"{prefix}loss", loss, prog_bar=True)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        way = self.ways["steps"]
        if way in ("manual", "two optimizers", "accumulating by hand"):
            return self._by_hand(batch, batch_idx)
        if way == "skips a batch" and batch_idx == 1 and self.current_epoch == 0:
            return None
        loss = self._loss(batch, "")
        return {"loss": loss, "size": len(batch[0])} if way == "returns a dict" else loss

    def _by_hand(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        first, *others = optimizers if isinstance(optimizers, list) else [optimizers]
        every = 2 if self.ways["steps"] == "accumulating by hand" else 1
        loss = apply_terms(self, self._loss(batch, ""))
        self.manual_backward(loss / every)
        if (batch_idx + 1) % every == 0:
            for optimizer in (first, *others):
                optimizer.step()
                optimizer.zero_grad()
            schedules = self.lr_schedulers()
            if schedules is not None and not isinstance(schedules, torch.optim.lr_scheduler.ReduceLROnPlateau):
                schedules.step()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._loss(batch, "val_")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(batch, "test_")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]

    def _loader(self, seed: int = 0) -> Any:
        if self.ways["loader"] == "stream" and seed == 0:
            return DataLoader(Stream(), batch_size=self.batch_size)
        return DataLoader(data(seed=seed), batch_size=self.batch_size, shuffle=self.ways["loader"] == "shuffled" and seed == 0)

    def train_dataloader(self) -> Any:
        return self._loader()

    def val_dataloader(self) -> Any:
        loaders = [self._loader(1), self._loader(2)]
        return loaders if self.ways["loader"] == "two validation loaders" else loaders[0]

    def test_dataloader(self) -> Any:
        return self._loader(2)

    def predict_dataloader(self) -> Any:
        return self._loader(3)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.ways["steps"] == "two optimizers":
            head = list(self.network.head.parameters())
            rest = [parameter for parameter in trained if all(parameter is not each for each in head)]
            return [torch.optim.SGD(rest, self.lr), torch.optim.Adam(head, self.lr)], []
        if self.ways["steps"] == "L-BFGS":
            return torch.optim.LBFGS(trained, lr=0.01, max_iter=2)
        kind = torch.optim.AdamW if self.ways["steps"] == "AdamW" else torch.optim.SGD
        optimizer = kind(trained, self.lr)
        if self.ways["schedule"] == "StepLR":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        if self.ways["schedule"] == "one cycle":
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1, cycle_momentum=False)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]
        if self.ways["schedule"] == "plateau":
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "loss"}}
        return optimizer


@cache
def subject_class(namespace: str) -> Any:
    """The module that is trained, as a class of one of Lightning's namespaces."""
    module: Any = importlib.import_module(namespace).LightningModule
    return type("Subject", (Steps, module), {"__module__": __name__})


def _trainer(name: str, factor: str, **settings: Any) -> Feature:
    return Feature(name, factor, lambda pl, folder: settings)


def _callback(name: str, make: Made, **settings: Any) -> Feature:
    return Feature(name, "callback", lambda pl, folder: settings, lambda pl, folder: [make(pl, folder)])


def _logged(name: str, make: Made) -> Feature:
    settings = lambda pl, folder: {"logger": pl.loggers.CSVLogger(folder), "log_every_n_steps": 1}  # noqa: E731
    return Feature(name, "callback", settings, lambda pl, folder: [make(pl, folder)])


def _subject(name: str, factor: str, **ways: str) -> Feature:
    return Feature(name, factor, subject=ways)


def _scaled(pl: Any, folder: Path) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return {"plugins": [pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)]}


def _writer(pl: Any, folder: Path) -> Any:
    class Writer(pl.callbacks.BasePredictionWriter):  # type: ignore[misc, name-defined]
        def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *args: Any) -> None:
            torch.save(prediction, folder / "prediction.pt")

    return Writer("batch")


def _finetuning(pl: Any, folder: Path) -> Any:
    class Freezes(pl.callbacks.BaseFinetuning):  # type: ignore[misc, name-defined]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.network.stem)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.network.stem, optimizer)

    return Freezes()


def _logger(pl: Any, folder: Path) -> dict[str, Any]:
    class Memory(pl.loggers.logger.Logger):  # type: ignore[misc, name-defined]
        """A logger of a user's own."""

        name, version = "memory", 0

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

        def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    return {"logger": [pl.loggers.CSVLogger(folder), Memory()], "log_every_n_steps": 1}


def _checkpoint(**settings: Any) -> Made:
    return lambda pl, folder: pl.callbacks.ModelCheckpoint(folder, **settings)


def _plain(kind: str, **settings: Any) -> Made:
    return lambda pl, folder: getattr(pl.callbacks, kind)(**settings)


NONE = "nothing"
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
_SEVERAL = {"max_epochs": 2}

# The first of each factor is what all others are tried beside.
FEATURES: tuple[Feature, ...] = (
    _trainer("max_epochs", "length", **_SEVERAL),
    _trainer("max_steps", "length", max_steps=4, max_epochs=-1),
    Feature(
        "stream without length", "length", lambda pl, folder: {"max_steps": 4, "max_epochs": -1}, subject={"loader": "stream"}
    ),
    Feature("shuffled", "length", lambda pl, folder: dict(_SEVERAL), subject={"loader": "shuffled"}),
    Feature(
        "two validation loaders", "length", lambda pl, folder: dict(_SEVERAL), subject={"loader": "two validation loaders"}
    ),
    _trainer("overfit_batches", "length", overfit_batches=1, **_SEVERAL),
    _trainer("fast_dev_run", "length", fast_dev_run=True),
    _trainer("limit_batches", "length", limit_train_batches=1, limit_val_batches=1, limit_test_batches=1, **_SEVERAL),
    _trainer("max_time", "length", max_time="00:00:10:00", **_SEVERAL),
    _trainer("min_steps", "length", min_steps=3, **_SEVERAL),
    _trainer("every batch", "accumulation"),
    _trainer("accumulate_grad_batches", "accumulation", accumulate_grad_batches=2),
    Feature(
        "GradientAccumulationScheduler",
        "accumulation",
        callbacks=lambda pl, folder: [pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})],
    ),
    _trainer("32 bits", "precision"),
    _trainer("bf16-mixed", "precision", precision="bf16-mixed"),
    Feature("16-mixed with a scaler", "precision", _scaled),
    _trainer("64-true", "precision", precision="64-true"),
    _trainer("bf16-true", "precision", precision="bf16-true"),
    _trainer("no clipping", "clipping"),
    _trainer("gradient_clip_val", "clipping", gradient_clip_val=0.1),
    _trainer("clip by value", "clipping", gradient_clip_val=0.1, gradient_clip_algorithm="value"),
    _subject("automatic", "optimisation"),
    _subject("AdamW", "optimisation", steps="AdamW"),
    _subject("L-BFGS", "optimisation", steps="L-BFGS"),
    _subject("manual optimisation", "optimisation", steps="manual"),
    _subject("accumulating by hand", "optimisation", steps="accumulating by hand"),
    _subject("two optimizers", "optimisation", steps="two optimizers"),
    _subject("returns a dict", "optimisation", steps="returns a dict"),
    _subject("skips a batch", "optimisation", steps="skips a batch"),
    _subject("no scheduler", "schedule"),
    _subject("StepLR", "schedule", schedule="StepLR"),
    _subject("one cycle", "schedule", schedule="one cycle"),
    _subject("ReduceLROnPlateau", "schedule", schedule="plateau"),
    _trainer("validation and sanity check", "validation", num_sanity_val_steps=2),
    _trainer("no validation", "validation", limit_val_batches=0),
    _trainer("val_check_interval", "validation", val_check_interval=1),
    _trainer("check_val_every_n_epoch", "validation", check_val_every_n_epoch=2),
    _subject("logs values", "logging"),
    _subject("logs torchmetrics", "logging", logs="metrics"),
    _subject("logs a dict", "logging", logs="dict"),
    _subject("logs nothing", "logging", logs="nothing"),
    _trainer("no logger", "logger"),
    Feature("CSVLogger", "logger", lambda pl, folder: {"logger": pl.loggers.CSVLogger(folder), "log_every_n_steps": 1}),
    Feature("two loggers", "logger", _logger),
    _trainer("no profiler", "profiler"),
    Feature("simple profiler", "profiler", lambda pl, folder: {"profiler": pl.profilers.SimpleProfiler(folder, "simple")}),
    Feature(
        "advanced profiler", "profiler", lambda pl, folder: {"profiler": pl.profilers.AdvancedProfiler(folder, "advanced")}
    ),
    Feature("PyTorch profiler", "profiler", lambda pl, folder: {"profiler": pl.profilers.PyTorchProfiler(folder, "pytorch")}),
    _trainer("no switch", "switch"),
    _trainer("deterministic", "switch", deterministic=True),
    _trainer("inference_mode=False", "switch", inference_mode=False),
    _trainer("enable_checkpointing=False", "switch", enable_checkpointing=False),
    _trainer("detect_anomaly", "switch", detect_anomaly=True),
    _trainer("reload_dataloaders_every_n_epochs", "switch", reload_dataloaders_every_n_epochs=1),
    Feature("barebones", "switch", lambda pl, folder: {"barebones": True}),
    _trainer("no callback", "callback"),
    _callback("EarlyStopping", _plain("EarlyStopping", monitor="loss", check_on_train_epoch_end=True)),
    _callback("EarlyStopping on validation", _plain("EarlyStopping", monitor="val_loss")),
    _callback("ModelCheckpoint", _checkpoint(monitor="val_loss", save_last=True)),
    _callback("ModelCheckpoint every step", _checkpoint(every_n_train_steps=1, save_top_k=-1)),
    _callback("ModelCheckpoint of weights", _checkpoint(save_weights_only=True)),
    _logged("LearningRateMonitor", _plain("LearningRateMonitor")),
    _callback("StochasticWeightAveraging", _plain("StochasticWeightAveraging", swa_lrs=1e-2, swa_epoch_start=1)),
    _callback("WeightAveraging", _plain("WeightAveraging")),
    _callback("EMAWeightAveraging", _plain("EMAWeightAveraging", decay=0.5)),
    _callback("BatchSizeFinder", _plain("BatchSizeFinder", steps_per_trial=1, init_val=2, max_trials=2)),
    _callback(
        "LearningRateFinder",
        _plain("LearningRateFinder", min_lr=1e-3, max_lr=1e-1, num_training_steps=3, early_stop_threshold=None),
    ),
    _logged("DeviceStatsMonitor", _plain("DeviceStatsMonitor")),
    _callback("ModelSummary", _plain("ModelSummary", max_depth=2)),
    _callback("RichModelSummary", _plain("RichModelSummary")),
    _callback("RichProgressBar", _plain("RichProgressBar"), enable_progress_bar=True),
    _callback("TQDMProgressBar", _plain("TQDMProgressBar"), enable_progress_bar=True),
    _callback("Timer", _plain("Timer", duration="00:00:10:00")),
    _logged("ThroughputMonitor", _plain("ThroughputMonitor", batch_size_fn=lambda batch: len(batch[0]), window_size=2)),
    _callback("BackboneFinetuning", _plain("BackboneFinetuning", unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)),
    _callback("BaseFinetuning", _finetuning),
    _callback("BasePredictionWriter", _writer),
    _callback("LambdaCallback", _plain("LambdaCallback", on_train_batch_end=lambda *args: None)),
    _callback("OnExceptionCheckpoint", lambda pl, folder: pl.callbacks.OnExceptionCheckpoint(folder)),
    _callback("ModelPruning", _plain("ModelPruning", pruning_fn="l1_unstructured", amount=0.2)),
    _callback("SpikeDetection", _plain("SpikeDetection")),
    _subject("fit", "afterwards"),
    _subject("validate", "afterwards"),
    _subject("test", "afterwards"),
    _subject("predict", "afterwards"),
    _subject("resume", "afterwards"),
    _subject("fit again", "afterwards"),
    _subject("load_from_checkpoint", "afterwards"),
    *(_subject(name, "namespace") for name in NAMESPACES),
)
BY_NAME = {feature.name: feature for feature in FEATURES}


def factors() -> dict[str, list[str]]:
    """Names of features by factor, the default first; the other namespace only where it is installed."""
    found: dict[str, list[str]] = {}
    for feature in FEATURES:
        if feature.factor != "namespace" or importlib.util.find_spec(feature.name) is not None:
            found.setdefault(feature.factor, []).append(feature.name)
    return found
