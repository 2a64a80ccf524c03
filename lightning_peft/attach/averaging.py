"""Averaged copies of the module (EMA, SWA) that Lightning made before weight maps were attached."""

from __future__ import annotations

import warnings

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging


def rebuild(trainer: Trainer, module: LightningModule) -> None:
    """Let averaging callbacks copy the module again, so that their copies have the same parameters in the same order.

    Both callbacks copy in their ``setup``, which runs before the module is complete, and later pair parameters by position:
    a copy without the maps would be averaged with the wrong tensors, silently.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            with warnings.catch_warnings():
                # Said once already by the callback's own setup, when it applies.
                warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback")
                callback.setup(trainer, module, "fit")
