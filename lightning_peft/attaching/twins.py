"""Copies of mapped weights: a teacher in the module that follows a student by position, an average that user code keeps."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable
from itertools import takewhile

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.compose.lanes import Lane
from lightning_peft.weights.mapped_layer import copied_layers
from lightning_peft.weights.maps import MappedTensor, mapped_tensors, plain_tensors


def twins(module: nn.Module) -> dict[str, str]:
    """Find tensors without maps that hold the same values as one whose stored value is not its weight.

    Masks are passed over: what is stored under a mask is a dense weight, which a copy may follow.

    Args:
        module: A module whose maps were just attached.

    Returns:
        Name of the mapped tensor to the name of its copy.
    """
    stored = {name: tensor for name, tensor in plain_tensors(module).items() if isinstance(tensor, nn.Parameter)}
    mapped = {entry.name: entry for entry in mapped_tensors(module, every_name=True)}
    others = [(name, tensor) for name, tensor in stored.items() if name not in mapped]
    found = {}
    for name, entry in mapped.items():
        if any(weight_map.lane < Lane.MASK for weight_map in entry.maps):
            same = (other for other, tensor in others if _alike(entry, tensor))
            if (copy := next(same, None)) is not None:
                found[name] = copy
    return found


@torch.no_grad()
def _alike(entry: MappedTensor, other: Tensor) -> bool:
    if entry.stored.shape != other.shape or entry.stored is other or other.is_meta or other.numel() < 2:
        return False
    pristine = entry.chain.pristine
    value = entry.stored if pristine is None else pristine
    # Zeros and ones say nothing: every new bias and norm holds them.
    return torch.equal(value, other) and bool((value != value.flatten()[0]).any())


def warn_of_twins(module: nn.Module) -> None:
    """Say that code which averages a copy with its original would mix stored values with weights."""
    found = twins(module)
    if not found:
        return
    (name, copy), *more = found.items()
    also = f", and {len(more)} more such pairs" if more else ""
    both = [target for names in (found, found.values()) for target in _layers_of(list(names))]
    rank_zero_warn(
        f"{copy} is a copy of {name}{also}, but only {name} is under weight maps, and the values stored under them are not "
        "the weights. Code that moves the copy towards parameters(), as a momentum teacher's does, would average something "
        f"else. If there is such code, leave both out: exclude={both!r}."
    )


def _layers_of(names: list[str]) -> list[str]:
    """Targets that cover the layers of some tensors: the part of the module they are all in, or each layer."""
    paths = [name.split(".")[:-1] for name in names]
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    if len(names) > 1 and shared:
        return [f"re:^{re.escape('.'.join(shared))}\\."]
    return sorted({".".join(path) for path in paths})


def warn_of_copies(module: nn.Module, followed: Iterable[nn.Module]) -> None:
    """Say that copies which user code made in training and still holds have maps of their own.

    Args:
        module: A module whose maps are about to be taken off.
        followed: Copies that are kept up to date, those of averaging callbacks.
    """
    known = {part for whole in (module, *followed) for part in whole.modules()}  # growth copies layers within the module
    if _copied(module, known):
        gc.collect()  # a copy that nobody holds any more may be part of a cycle
    if names := _copied(module, known):
        rank_zero_warn(
            f"The training ends with a copy of the module (of {names[0]}, for one) that was made while weight maps were on "
            "it. The copy keeps maps of its own, with masks and schedules as they were at that moment. Turn it into an "
            "ordinary network with lightning_peft.bake(copy). To average weights, use Lightning's WeightAveraging or "
            "EMAWeightAveraging, which the methods follow."
        )


def _copied(module: nn.Module, known: set[nn.Module]) -> list[str]:
    originals = {original for copy, original in copied_layers() if copy not in known}
    return [name for name, part in module.named_modules() if part in originals]
