"""Averaged copies of the module (EMA, SWA), which Lightning makes once and pairs with the module by position."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_peft.namespaces import both
from lightning_peft.structure.edits import Change
from lightning_peft.structure.part_slices import part_entries
from lightning_peft.structure.slices import narrow
from lightning_peft.weights.maps import plain_name, plain_values, set_plain_values
from lightning_peft.weights.parts import part_tensors


def _averaging(trainer: Trainer) -> Iterator[Any]:
    return (
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, both(WeightAveraging, StochasticWeightAveraging))
    )


def swapped_in(trainer: Trainer) -> list[WeightAveraging]:
    """Averaging callbacks whose average stands in the module while a Trainer validates on its own, until they swap it out."""
    if trainer.state.fn != TrainerFn.VALIDATING:
        return []
    return [each for each in _averaging(trainer) if isinstance(each, both(WeightAveraging)) and each._average_model is not None]


def copies(trainer: Trainer) -> list[nn.Module]:
    """Return the averaged copies of the module that callbacks keep."""
    return [callback._average_model for callback in _averaging(trainer) if callback._average_model is not None]


def shown(trainer: Trainer) -> nn.Module | None:
    """Return the average that stands in the state dict of a Trainer's checkpoints, as a module of the user's class."""
    averages = (each for each in _averaging(trainer) if isinstance(each, both(WeightAveraging)))
    return next((_inner(each._average_model) for each in averages if each._average_model is not None), None)


def averaged_modules(trainer: Trainer) -> list[nn.Module]:
    """Return what :func:`copies` does, each as a module of the user's class."""
    return [_inner(copy) for copy in copies(trainer)]


def rebuild(trainer: Trainer, module: LightningModule) -> None:
    """Let averaging callbacks copy the module again, so that their copies have the same parameters in the same order.

    Both callbacks copy in their ``setup``, which runs before the module is complete, and later pair parameters by position:
    a copy without the maps would be averaged with the wrong tensors, silently.
    """
    for callback in _averaging(trainer):
        _copy_again(callback, trainer, module)


def _copy_again(callback: Any, trainer: Trainer, module: LightningModule) -> None:
    with warnings.catch_warnings():
        # Said once already by the callback's own setup, when it applies.
        warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback")
        callback.setup(trainer, module, "fit")


@dataclass(frozen=True)
class Average:
    """The averages of a callback before an edit of the module."""

    callback: Any
    tensors: Mapping[str, Tensor]
    parts: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]
    counters: Mapping[str, Tensor]


def averages(trainer: Trainer) -> list[Average]:
    """Take down every averaged copy of the module, tensors by name."""
    found = []
    for callback in _averaging(trainer):
        outer = callback._average_model
        if outer is None:
            continue
        inner = _inner(outer)
        counters = {} if inner is outer else {key: value for key, value in outer.state_dict().items() if "." not in key}
        found.append(Average(callback, dict(inner.state_dict()), part_tensors(inner), plain_values(inner), counters))
    return found


def _inner(outer: nn.Module) -> nn.Module:
    return outer.module if isinstance(outer, torch.optim.swa_utils.AveragedModel) else outer


@torch.no_grad()
def edit_averages(
    taken: list[Average],
    trainer: Trainer,
    module: LightningModule,
    change: Change,
    values: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> None:
    """Copy the edited module for every average and fill in what was averaged so far.

    A new tensor's average is what the same edit makes of the old averages, so the averaged network grows as the trained one.

    Args:
        taken: What :func:`averages` gave before the edit.
        trainer: The Trainer.
        module: The module, edited.
        change: What the edit did.
        values: Plain values after the edit from plain values before it.
    """
    for average in taken:
        device = next(iter(average.tensors.values())).device
        _copy_again(average.callback, trainer, module)
        outer = average.callback._average_model
        outer.to(device)
        inner = _inner(outer)
        now = inner.state_dict()
        for name, tensor in average.tensors.items():
            target = now.get(change.new_name(name) or "")
            tensor = change.new_value(plain_name(name), tensor)
            if target is not None and target.shape == tensor.shape:
                target.copy_(tensor)
        cut = part_entries(module, change.edit, average.parts)
        for name, tensor in part_tensors(inner).items():
            taken_from = average.parts.get(change.source(name) or change.old_name(name))
            if taken_from is not None:
                tensor.copy_(narrow(taken_from, cut[name]["kept"]) if name in cut else taken_from)
        set_plain_values(inner, values(average.plain))
        for name, value in average.counters.items():
            outer.state_dict()[name].copy_(value)
