"""Running a module's own evaluation step over all batches, again and again in the same way."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_peft.arguments import one_of
from lightning_peft.capture.nested_trainer import quiet_trainer, trainers_kept
from lightning_peft.namespaces import own
from lightning_peft.network.tensor_bytes import checksum

Stage = Literal["validate", "test", "predict"]
STAGES: tuple[Stage, ...] = get_args(Stage)
_STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
_EXPECTED = (".*does not have many workers", ".*sampler has shuffling enabled", "Total length of .* across ranks is zero")


class StepPasses:
    """Passes of a module's evaluation step over the same batches, from the same random numbers.

    Args:
        module: The module.
        batches: A loader or a list.
        stage: Whose step: ``"validate"``, ``"test"`` or ``"predict"``; ``None`` takes the first that the module defines, else
            ``"predict"``, which calls ``forward``.
        settings: Further arguments of the Trainer.
        seed: Seed of a pass.

    Attributes:
        digest: Of all tensors of all batches, as the step got them in the first pass; 0 before.
        batches: Number of batches of the first pass.
    """

    def __init__(
        self, module: LightningModule, batches: Iterable[Any], stage: Stage | None, settings: dict[str, Any], seed: int = 0
    ) -> None:
        if isinstance(batches, Iterator):
            raise MisconfigurationException(
                "batches= can be iterated only once, and every block needs them again. Pass a loader or a list: "
                "batches=list(batches)."
            )
        if stage is not None:
            one_of("stage", stage, STAGES)
        self._module, self._seed = module, seed
        self._data: Any = batches if isinstance(batches, DataLoader) else _OneLoader(batches)
        defined: Stage = next((name for name in STAGES[:2] if _defines(module, name)), "predict")
        self._stage = defined if stage is None else stage
        self.digest = self.batches = 0
        self._watcher = _BatchWatcher()
        self.trainer = quiet_trainer(devices=1, callbacks=[self._watcher], **settings)
        if self.trainer.world_size > 1:
            raise MisconfigurationException(
                f"calibrate runs in one process, and this is one of {self.trainer.world_size}. Call it before they are started."
            )

    def run(self) -> None:
        """Run the step over all batches.

        Raises:
            MisconfigurationException: The batches are not those of the first pass, or there are none.
        """
        self._watcher.digest = self._watcher.batches = 0
        with trainers_kept(self._module), isolate_rng(), warnings.catch_warnings():
            torch.manual_seed(self._seed)
            random.seed(self._seed)
            for known in _EXPECTED:
                warnings.filterwarnings("ignore", message=known)
            self._evaluate()
        if not self._watcher.batches:
            raise MisconfigurationException("batches= holds no batch, so there is nothing to calibrate on.")
        found, first = (self._watcher.digest, self._watcher.batches), (self.digest, self.batches)
        if first[1] and found != first:
            raise MisconfigurationException(
                "batches= gave other batches in a later pass than in the first. Pass a loader without shuffle=True or random "
                "augmentation of its own, or a list of batches."
            )
        self.digest, self.batches = found

    def _evaluate(self) -> None:
        if self._stage == "predict":
            self.trainer.predict(self._module, self._data, return_predictions=False)
        else:
            getattr(self.trainer, self._stage)(self._module, self._data, verbose=False)


def _defines(module: LightningModule, stage: str) -> bool:
    return bool(is_overridden(_STEPS[stage], module, own(LightningModule, module)))


class _OneLoader:
    """What Lightning takes for one loader, where it would take a list for several."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # Lightning knows the TypeError of what has no length


class _BatchWatcher(Callback):
    """Takes the digest of every batch the step is given."""

    def __init__(self) -> None:
        self.digest = self.batches = 0

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.batches += 1
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor):
                self.digest = checksum(leaf, self.digest)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
