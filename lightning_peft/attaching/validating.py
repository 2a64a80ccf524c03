"""Validations within a fit: what they judge, the network as it is trained or what would be shipped of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn

from lightning_peft.compose.run import Run
from lightning_peft.contract import Contract
from lightning_peft.namespaces import both
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.weight_map import WeightMap


def show_baked(module: nn.Module, methods: Iterable[Contract], *, on: bool) -> None:
    """Let layers compute with baked weights, where a method says so, or as in training again."""
    names = {method.name for method in methods if method.validated_as == "baked"}
    for mapped in mapped_tensors(module) if names else ():
        for weight_map in mapped.maps:
            if weight_map.method in names:
                weight_map.as_baked = on


def warn_of_judges(run: Run, methods: Iterable[Contract]) -> None:
    """Warn when epochs are compared by a score of a network that is not the one that comes out of them."""
    judges = [f"{type(callback).__name__}(monitor={callback.monitor!r})" for callback in _judges(run.trainer)]
    for method in methods if judges else ():
        softer = any(kind.bake is not WeightMap.bake for kind in method.weight_maps)
        if softer and method.validated_as == "trained" and (awaited := next(iter(method.awaited(run)), "")):
            kind = type(method).__name__
            cure = f', or validate what would be shipped: {kind}(validate="baked")' if "validate" in method._arguments else ""
            warnings.warn(
                f"{method.name}: {judges[0]} compares epochs, and those before {awaited} by a network that is not pruned as "
                f"it will be, so the best is likely one of them. Take one after that, for instance the last{cure}.",
                UserWarning,
                stacklevel=2,
            )


def _judges(trainer: Trainer) -> Iterator[Any]:
    kinds: tuple[type[Callback], ...] = (*both(ModelCheckpoint), *both(EarlyStopping))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, kinds) and getattr(callback, "monitor", None) is not None:
            yield callback
