"""Adaptation of BatchNorm statistics alone: no gradient, no label."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft.contract import SHARDED
from lightning_peft.network.targets import excluded
from lightning_peft_plugins.test_time._shared.batch_statistics import (
    BatchNorm,
    BlendStatistics,
    UseBatchStatistics,
    batch_norms,
)
from lightning_peft_plugins.test_time._shared.stream import StreamMethod


class BatchNormAdapt(StreamMethod):
    """BatchNorm layers normalise with statistics of the data at hand: of each batch, blended with the source's, or averaged.

    Args:
        alpha: Weight of the batch. 1 takes the batch as it is (BN-1, with the biased variance, as in training); below, source
            and batch are blended, with the unbiased variance (BN-alpha).
        prior: Instead of ``alpha``: the source counts as so many samples against the batch as one, ``alpha = 1 / (prior + 1)``;
            16 in the paper on robustness (Schneider et al., 2020).
        momentum: Keep what was blended and blend the next batch into it, as an exponential moving average; the weight of the
            batch is ``momentum``.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.stream.StreamMethod`; ``keep=True``
            leaves the last statistics in the module.

    Raises:
        MisconfigurationException: More than one of the three is given, or one out of range.

    Example:
        >>> BatchNormAdapt(prior=16).weight
        0.058823529411764705
    """

    strategies = SHARDED
    paper = (
        "Nado et al.: Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift, 2020, "
        "https://arxiv.org/abs/2006.10963; Schneider et al.: Improving robustness against common corruptions by covariate "
        "shift adaptation, NeurIPS 2020, https://arxiv.org/abs/2006.16971"
    )

    def __init__(
        self, *, alpha: float | None = None, prior: float | None = None, momentum: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        given = {"alpha": alpha, "prior": prior, "momentum": momentum}
        given = {key: value for key, value in given.items() if value is not None}
        if len(given) > 1:
            raise MisconfigurationException(f"{' and '.join(given)} all set the weight of the batch. Give one of them.")
        if prior is not None and prior < 0:
            raise MisconfigurationException(f"prior={prior} must be a number of samples, 0 or more.")
        self.weight = 1.0 if not given else 1.0 / (prior + 1.0) if prior is not None else next(iter(given.values()))
        self.accumulate = momentum is not None
        self._statistics: UseBatchStatistics | BlendStatistics = UseBatchStatistics(())
        if not 0.0 <= self.weight <= 1.0:
            raise MisconfigurationException(f"{given} gives the batch the weight {self.weight:.3g}, which is not in [0, 1].")

    def claims(self, module: nn.Module) -> Iterable[str]:
        return []

    def adapt_start(self, run: Run) -> None:
        super().adapt_start(run)
        layers = self._layers(run)
        if self.weight == 1.0 and not self.accumulate:
            self._statistics = UseBatchStatistics(layers, self.kept)
        else:
            self._statistics = BlendStatistics(layers, self.weight, self.accumulate, self.kept)

    def _layers(self, run: Run) -> list[BatchNorm]:
        everything = batch_norms(run.network).values()
        if not everything:
            raise MisconfigurationException(
                f"{self.name}: {type(run.network).__name__} has no BatchNorm layer with running statistics. Tent or EATA adapt "
                "other norm layers."
            )
        chosen = None if self.targets is None else set(self.select(run.module).values())
        spared = excluded(run.module, self.exclude)
        layers = [layer for layer in everything if layer not in spared and (chosen is None or layer in chosen)]
        if not layers:
            raise MisconfigurationException(
                f"{self.name}: targets={self.targets!r} with exclude={self.exclude!r} names none of the {len(everything)} "
                'BatchNorm layers of the network. Leave both out for all of them, or name some: targets="re:<their names>".'
            )
        return layers

    def update(self, call: Call) -> Any:
        self.updates += 1
        with self.predicting():
            return call()

    def to_source(self) -> None:
        if isinstance(self._statistics, BlendStatistics):
            self._statistics.reset()

    def release(self) -> None:
        self._statistics.restore()
