"""Optimizer state across an edit: new parameters join the group of their source, removed ones leave, states follow a rule."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.optim.group_counters import reset_counters
from lightning_peft.optim.optimizers import init_late_state, named_groups, place_parameters
from lightning_peft.optim.schedulers import group_lists
from lightning_peft.optim.wrapped import innermost

RULES = ("reset", "copy", "pad")


def join(
    optimizers: Sequence[Optimizer], schedulers: Sequence[Any], pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
) -> None:
    """Let new parameters be trained like the parameters they were copied from.

    Groups are extended in place, so every scheduler keeps its count of groups. Copies of what no optimizer trains are not
    trained either.

    Args:
        optimizers: All optimizers.
        schedulers: All schedulers.
        pairs: New parameter and its source, by the new one's name.
    """
    for name, (new, source) in pairs.items():
        place_parameters(optimizers, schedulers, {name: new}, source, {})


def leave(optimizers: Sequence[Optimizer], gone: Collection[nn.Parameter]) -> None:
    """Let optimizers forget parameters that left the module.

    A group left empty stays, since optimizers and schedulers count by position.

    Args:
        optimizers: All optimizers.
        gone: Parameters that no module holds any more.
    """
    identities = {id(parameter) for parameter in gone}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            stays = [id(parameter) not in identities for parameter in group["params"]]
            if all(stays):
                continue
            for key in ("params", "param_names"):
                if key in group:
                    group[key][:] = [entry for entry, kept in zip(group[key], stays, strict=True) if kept]
            if isinstance(lbfgs := innermost(optimizer), torch.optim.LBFGS):  # what it keeps are vectors over all parameters
                lbfgs.state.clear()
                lbfgs._numel_cache = None
        for parameter in gone:
            optimizer.state.pop(parameter, None)


@torch.no_grad()
def copy_states(
    optimizers: Sequence[Optimizer], pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]], *, restart_steps: bool = False
) -> None:
    """Give new parameters the optimizer state of their sources.

    Args:
        optimizers: All optimizers.
        pairs: New parameter and its source, by name.
        restart_steps: Count the steps of every parameter of these optimizers from 0 again, as StackedBERT's official code does.
    """
    for new, source in pairs.values():
        for optimizer in optimizers:
            if source in optimizer.state:
                optimizer.state[new] = {key: _twin(value) for key, value in optimizer.state[source].items()}
    if restart_steps:
        for optimizer in optimizers:
            for state in optimizer.state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"].zero_()
                elif "step" in state:
                    state["step"] = 0


def _twin(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def reset_states(optimizers: Sequence[Optimizer]) -> None:
    """Let optimizers start as if they had never taken a step; hyperparameters and groups stay."""
    for optimizer in [part for each in optimizers for part in _made_of(each)]:
        optimizer.state.clear()
        reset_counters(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                init_late_state(optimizer, parameter, group)
        if isinstance(lbfgs := innermost(optimizer), torch.optim.LBFGS):
            lbfgs._numel_cache = None


def _made_of(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those it is made of: Lookahead keeps the state of its inner one there."""
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer) and value is not optimizer]
    return [optimizer, *(part for each in inner for part in _made_of(each))]


def group_names(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[list[list[str]]]:
    """Names of the parameters in each group of each optimizer, for a checkpoint."""
    return [named_groups(module, optimizer) for optimizer in optimizers]


def regroup(
    module: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[Any], names: Sequence[Sequence[Sequence[str]]]
) -> None:
    """Sort the groups of newly built optimizers as they were when a checkpoint was saved.

    Lightning restores optimizer state by position. ``configure_optimizers`` lists the parameters of a grown network in its own
    order, in which equally shaped states would land on the wrong parameters without a word.

    Args:
        module: The module.
        optimizers: Its optimizers, as ``configure_optimizers`` made them.
        schedulers: Their schedulers.
        names: What :func:`group_names` gave when the checkpoint was saved.

    Raises:
        MisconfigurationException: The optimizers hold other parameters now.
    """
    if len(names) != len(optimizers):
        raise MisconfigurationException(
            f"The checkpoint was saved with {len(names)} optimizers, configure_optimizers returned {len(optimizers)}."
        )
    for optimizer, then in zip(optimizers, names, strict=True):
        now = named_groups(module, optimizer)
        if now != [list(group) for group in then]:
            _regroup(dict(module.named_parameters()), optimizer, schedulers, now, then)


def _regroup(
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    schedulers: Sequence[Any],
    now: Sequence[Sequence[str]],
    then: Sequence[Sequence[str]],
) -> None:
    home = {name: index for index, group in enumerate(now) for name in group}
    difference = sorted(set(home) ^ {name for group in then for name in group})
    if difference:
        how = "trained now and was not" if difference[0] in home else "not trained now and was"
        raise MisconfigurationException(
            f"{type(optimizer).__name__} cannot be resumed: {difference[0]} is {how} when the checkpoint was saved "
            f"({len(difference)} such parameters). configure_optimizers must choose the same parameters on the grown network."
        )
    # An empty group can have been any; the last is as good, since its hyperparameters come from the checkpoint.
    templates = [home[group[0]] if group else min(index, len(now) - 1) for index, group in enumerate(then)]
    called = {
        parameter: name
        for group in optimizer.param_groups
        for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }
    groups = [dict(optimizer.param_groups[index]) for index in templates]
    for group, members in zip(groups, then, strict=True):
        group["params"] = [parameters[name] for name in members]
        if "param_names" in group:
            group["param_names"] = [called[parameter] for parameter in group["params"]]
    for _, values in group_lists(schedulers, optimizer).values():
        values[:] = [values[index] for index in templates]
    optimizer.param_groups[:] = groups
