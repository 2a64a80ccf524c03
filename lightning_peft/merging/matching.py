"""Whether models can be merged, and what becomes of each of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.model import Model
from lightning_peft.merging.structures import check_structures

_STATISTICS = ("running_mean", "running_var")
Fate = Literal["merged", "averaged", "kept", "tied"]


@dataclass(frozen=True)
class Entry:
    """A tensor that all models have.

    Attributes:
        name: Its name.
        fate: ``merged``; ``averaged``, whatever the method: statistics of batch norms; ``kept`` as the first model has it: what
            is no floating-point number, counters for instance; ``tied`` to an earlier name.
        source: For a tied one, that name; else its own.
    """

    name: str
    fate: Fate
    source: str


def matched(models: Sequence[Model], *, mixed: bool = False) -> list[Entry]:
    """Match the tensors of models by name.

    Args:
        models: All of them, the base too.
        mixed: Whether they may be of several precisions.

    Raises:
        MergeError: One has other tensors, of other shapes or kinds.
    """
    first, *others = models
    check_structures(models)
    for other in others:
        _check_names(first, other)
        for name, tensor in first.tensors.items():
            _check_tensor(name, tensor, other.tensors[name], (first.label, other.label), mixed)
    shared = [model.tied() for model in models]
    entries = []
    for name, tensor in first.tensors.items():
        source = shared[0].get(name, name)
        # Untied where one model has it untied: two values then, of which neither may get lost.
        if source != name and all(each.get(name) == source for each in shared):
            entries.append(Entry(name, "tied", source))
        else:
            entries.append(Entry(name, _fate(name, tensor), name))
    return entries


def _fate(name: str, tensor: Tensor) -> Fate:
    if not tensor.is_floating_point():
        return "kept"
    return "averaged" if name.rpartition(".")[2] in _STATISTICS else "merged"


def _check_names(first: Model, other: Model) -> None:
    missing = [name for name in first.tensors if name not in other.tensors]
    more = [name for name in other.tensors if name not in first.tensors]
    if not missing and not more:
        return
    holder, lacks, names = (first, other, missing) if missing else (other, first, more)
    count = len(missing) + len(more)
    raise MergeError(
        f"{lacks.label} has no {names[0]}, which {holder.label} has"
        f"{f'; {count - 1} more names are in one alone' if count > 1 else ''}. Models are merged tensor by tensor, so all must "
        f"be of one architecture.{_of_prefix(first, other)}"
    )


def _of_prefix(first: Model, other: Model) -> str:
    """A hint where names differ by what they begin with, as those of a network and of the module around it."""
    for long, short in ((first, other), (other, first)):
        name = next(iter(short.tensors), "")
        prefix = next((each.removesuffix(name) for each in long.tensors if name and each.endswith(f".{name}")), "")
        if prefix and all(f"{prefix}{each}" in long.tensors for each in short.tensors):
            return f" Those of {long.label} begin with {prefix!r}: save the module of both, or the network within it of both."
    return ""


def _check_tensor(name: str, one: Tensor, two: Tensor, labels: tuple[str, str], mixed: bool) -> None:
    if one.shape != two.shape:
        grown = one.dim() == two.dim() and one.dim() > 0 and one.shape[1:] == two.shape[1:]
        hint = (
            "Where only the number of rows differs, a vocabulary or a number of classes does: give all models the same before "
            "they are merged."
            if grown
            else "Models of one architecture can be merged; a network that was grown or pruned, with others that were so too."
        )
        raise MergeError(f"{name} is {tuple(one.shape)} in {labels[0]} and {tuple(two.shape)} in {labels[1]}. {hint}")
    if one.is_floating_point() != two.is_floating_point():
        raise MergeError(
            f"{name} is {_type(one)} in {labels[0]} and {_type(two)} in {labels[1]}: a quantised model cannot be merged with "
            "one that is not."
        )
    if one.is_floating_point() and one.dtype != two.dtype and not mixed:
        raise MergeError(
            f"{name} is {_type(one)} in {labels[0]} and {_type(two)} in {labels[1]}. Say what the merged model is to be of: "
            'dtype="float32" (on the command line: --dtype float32).'
        )


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def working_type(models: Sequence[Model]) -> torch.dtype:
    """Return the type that is computed in: double precision where a model is in it, else single."""
    double = any(tensor.dtype == torch.float64 for model in models for tensor in model.tensors.values())
    return torch.float64 if double else torch.float32
