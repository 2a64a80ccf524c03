"""What learning-rate schedulers keep: lists per parameter group, so that groups can be added under them, and how to restart."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.optim.wrapped import same_groups

GroupLists: TypeAlias = dict[int, tuple[str, list[Any]]]
"""By identity: attribute name and the list itself, one entry per group."""

# names torch gives to lists per group; lists of other kinds that can happen to be as long; learning rates
_PER_GROUP = {"base_lrs", "max_lrs", "min_lrs", "lr_lambdas", "base_momentums", "max_momentums", "_last_lr"}
_NOT_PER_GROUP = re.compile("milestone|schedul|phase|epoch|boundar|interval|restart|history")
_LEARNING_RATE = re.compile(r"(^|_)lrs?$|^base_values$")


def group_lists(schedulers: Iterable[Any], optimizer: Optimizer) -> GroupLists:
    """Every list with one entry per group in the schedulers of ``optimizer``, wrapped schedulers included.

    In schedulers from elsewhere than torch, a list of that length counts unless its name denies it. Wrapper and wrapped
    scheduler can share one list (``SequentialLR`` does); it appears once.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> warmup = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: min(1.0, step / 10))
        >>> sorted(name for name, _ in group_lists([warmup], sgd).values())
        ['_last_lr', 'base_lrs', 'lr_lambdas']
    """
    found = (entry for scheduler in _attached(schedulers, optimizer, set()) for entry in _lists_of(scheduler, optimizer))
    return {id(values): (name, values) for name, values in found}


@dataclass(frozen=True)
class FreshSchedule:
    """A scheduler as it was before its first step, with the hyperparameters it sets in its optimizer's groups."""

    scheduler: Any
    state: dict[str, Any]
    groups: list[dict[str, Any]]

    @classmethod
    def of(cls, scheduler: Any) -> FreshSchedule:
        """Note a scheduler that has taken no step and was restored from no checkpoint."""
        groups = scheduler.optimizer.param_groups
        return cls(scheduler, copy.deepcopy(scheduler.state_dict()), [_hyperparameters(group) for group in groups])

    def restart(self) -> None:
        """Let the schedule begin again; groups added since then go on like the last one it knew."""
        groups = self.scheduler.optimizer.param_groups
        state = copy.deepcopy(self.state)
        lists = {name: len(values) for name, values in _lists_of(self.scheduler, self.scheduler.optimizer)}
        for name, length in lists.items():
            if isinstance(state.get(name), list):
                state[name] += [copy.deepcopy(state[name][-1]) for _ in range(length - len(state[name]))]
        self.scheduler.load_state_dict(state)
        for group, fresh in zip(groups, self.groups, strict=False):
            for key, value in fresh.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)  # a compiled step holds on to the tensor
                else:
                    group[key] = copy.deepcopy(value)


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """What schedulers move: learning rates and momenta."""
    moved = {key: value for key, value in group.items() if is_learning_rate(key) or key in ("momentum", "betas")}
    return {key: float(value) if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in moved.items()}


def is_learning_rate(name: str) -> bool:
    """Whether a group key or scheduler attribute of that name holds learning rates."""
    return _LEARNING_RATE.search(name) is not None


def scaled(name: str, value: Any, scale: float) -> Any:
    """The setting ``name`` for a group whose learning rate is ``scale`` times another's; never an alias of a tensor."""
    if scale != 1.0 and is_learning_rate(name):
        return value * scale
    return value.clone() if isinstance(value, Tensor) else value


def _attached(schedulers: Iterable[Any], optimizer: Optimizer, seen: set[int]) -> Iterator[Any]:
    """Schedulers of ``optimizer``, those wrapped in others included."""
    for entry in schedulers:
        scheduler = getattr(entry, "scheduler", entry)  # Lightning's LRSchedulerConfig
        if not same_groups(getattr(scheduler, "optimizer", None), optimizer) or id(scheduler) in seen:
            continue
        seen.add(id(scheduler))
        yield scheduler
        for value in vars(scheduler).values():
            yield from _attached(value if isinstance(value, (list, tuple)) else [value], optimizer, seen)


def _lists_of(scheduler: Any, optimizer: Optimizer) -> Iterator[tuple[str, list[Any]]]:
    """Lists with one entry per group: those torch names, and any other of that length whose name does not deny it."""
    known = type(scheduler).__module__.startswith("torch.optim")
    for key, values in vars(scheduler).items():
        if not isinstance(values, list) or len(values) != len(optimizer.param_groups):
            continue
        if key in _PER_GROUP or (not known and not _NOT_PER_GROUP.search(key) and all(map(_is_setting, values))):
            yield key, values


def _is_setting(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor)) or callable(value)
