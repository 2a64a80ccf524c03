"""What optimizers count in their parameter groups, beside the state of each parameter."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.optim.schedulers import is_learning_rate
from lightning_peft.optim.trial import new_optimizer
from lightning_peft.optim.wrapped import innermost

_MEMBERS = ("params", "param_names")
_STEPS = 3  # some things are counted from the second step on


def reset_counters(optimizer: Optimizer) -> None:
    """Let an optimizer without state of parameters say what a new one says, hyperparameters apart.

    LAMB, Adan and others count steps in their groups, Prodigy and D-Adaptation keep their estimates there, SPAM counts in the
    state of no parameter, StableSPAM in an attribute. What these are is asked of a new optimizer of the class, which takes
    steps on a small weight of its own: what it changes or adds is no hyperparameter.

    Args:
        optimizer: The optimizer; its groups are changed in place.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        >>> reset_counters(sgd)
        >>> sgd.param_groups[0]["lr"]
        0.1
    """
    optimizer = innermost(optimizer)
    for group in optimizer.param_groups:
        fresh = new_optimizer(optimizer, group)
        before = {} if fresh is None else _plain(fresh.param_groups[0])
        numbers = {} if fresh is None else _numbers(fresh)
        of_all: Any = {} if fresh is None else fresh.state  # some keep entries there under names, beside those of parameters
        shared = {key: value for key, value in of_all.items() if isinstance(key, str)}
        state: Any = optimizer.state
        state.update(copy.deepcopy(shared))
        if fresh is None or not _step(fresh):
            _reset_named(optimizer, group, before)
            continue
        after = fresh.param_groups[0]
        for key in [key for key in group if key in after and key not in _MEMBERS and not is_learning_rate(key)]:
            if key not in before:
                del group[key]
            elif _differs(before[key], after[key]):
                group[key] = copy.deepcopy(before[key])
        moved = {key: numbers[key] for key, value in _numbers(fresh).items() if key in numbers and value != numbers[key]}
        vars(optimizer).update(moved)


def _reset_named(optimizer: Optimizer, group: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Reset what is called a step, for an optimizer that is made of another one, or takes no step alone."""
    for key in [key for key, value in group.items() if type(value) is int and key.endswith("step")]:
        first = optimizer.defaults.get(key, before.get(key))
        if first is None:
            del group[key]
        else:
            group[key] = first


def _numbers(optimizer: Optimizer) -> dict[str, int | float]:
    return {key: value for key, value in vars(optimizer).items() if type(value) in (int, float) and not key.startswith("_")}


def _step(optimizer: Optimizer) -> bool:
    """Take a few steps; say whether they could be taken."""
    (weight,) = optimizer.param_groups[0]["params"]
    with isolate_rng(include_cuda=False), contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(_STEPS):
            weight.grad = torch.linspace(0.5, 1.5 + step, 16).reshape(4, 4)
            optimizer.step()
        return True
    return False


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in group.items() if key not in _MEMBERS}


def _differs(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return not (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
    return bool(a != b)
