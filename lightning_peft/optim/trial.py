"""New optimizers of a class that somebody else chose, to ask how they behave."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_peft.optim.wrapped import innermost


def new_optimizer(optimizer: Optimizer, group: Mapping[str, Any]) -> Optimizer | None:
    """A new optimizer of the same class and hyperparameters over one small weight; ``None`` when it takes more to make one."""
    given = {**optimizer.defaults, "lr": group.get("lr", optimizer.defaults.get("lr"))}
    accepted = inspect.signature(type(optimizer).__init__).parameters
    settings = {key: copy.deepcopy(value) for key, value in given.items() if key in accepted}
    weight = nn.Parameter(torch.linspace(-1, 1, 16).reshape(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return type(optimizer)([weight], **settings)
        except Exception:  # a constructor may want anything
            return None


def decays_by_gradient(optimizer: Optimizer) -> bool:
    """Whether the weight decay of an optimizer is a term of the gradient, as in SGD, and not a step of its own, as in AdamW.

    It is asked: with the gradient that such a term cancels, a new optimizer of its class leaves a parameter where it is. One
    that cannot be made anew counts as one whose decay is a step of its own.

    Example:
        >>> weights = [nn.Parameter(torch.ones(2, 2))]
        >>> [decays_by_gradient(make(weights, lr=0.1)) for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)]
        [True, True, False]
    """
    optimizer = innermost(optimizer)
    fresh = new_optimizer(optimizer, optimizer.param_groups[0])
    if fresh is None:
        return False
    (group,) = fresh.param_groups
    (weight,) = group["params"]
    group["weight_decay"] = 0.5
    before = weight.detach().clone()
    weight.grad = -0.5 * before
    fresh.step()
    return torch.equal(weight, before)
