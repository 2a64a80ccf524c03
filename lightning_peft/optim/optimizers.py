"""Optimizer parameters by name, and moving them between groups with every learning-rate scheduler kept right.

Schedulers hold one entry per parameter group in lists of their own (``base_lrs``, ``lr_lambdas``, ``min_lrs``, ...)
and read further keys from the group itself (``initial_lr``, ``max_lr``, ...). A bare ``add_param_group`` after the
scheduler exists therefore fails: ``LambdaLR`` and ``SequentialLR`` with a ValueError from ``zip``, ``OneCycleLR`` with
a KeyError.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.optim.schedulers import GroupLists, group_lists, is_learning_rate, scaled
from lightning_peft.optim.wrapped import innermost


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """Fully qualified name of every parameter; a tied one under the first of its names.

    Example:
        >>> list(parameter_names(nn.Linear(2, 1)).values())
        ['weight', 'bias']
    """
    return {parameter: name for name, parameter in module.named_parameters()}


def trained_by(*optimizers: Optimizer) -> set[nn.Parameter]:
    """Every parameter in the groups of some optimizers.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> net.bias in trained_by(torch.optim.SGD([net.weight], lr=0.1))
        False
    """
    return {parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}


def named_groups(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Names of the parameters in each group of ``optimizer``, in order.

    Raises:
        MisconfigurationException: If the optimizer holds a parameter that ``module`` does not.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> named_groups(net, torch.optim.SGD([{"params": [net.bias]}, {"params": [net.weight]}], lr=0.1))
        [['bias'], ['weight']]
    """
    names = parameter_names(module)
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if parameter not in names:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} group {index}, position {position}: a parameter of shape "
                    f"{tuple(parameter.shape)} is not one of {type(module).__name__}. It was probably replaced after "
                    "the optimizer was built; build the optimizer from the parameters the module has now."
                )
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def owner(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> tuple[int, int] | None:
    """Index of the optimizer and of its group that update ``parameter``; ``None`` if none does.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> owner([torch.optim.SGD([net.bias], lr=0.1), torch.optim.SGD([net.weight], lr=0.1)], net.weight)
        (1, 0)
    """
    for optimizer_index, optimizer in enumerate(optimizers):
        group = _group_of(optimizer, parameter)
        if group is not None:
            return optimizer_index, group
    return None


def move_to_group(
    optimizer: Optimizer,
    parameters: Iterable[nn.Parameter] | Mapping[str, nn.Parameter],
    schedulers: Sequence[Any] = (),
    *,
    like: int | None = None,
    lr_scale: float = 1.0,
    **overrides: Any,
) -> None:
    """Give parameters hyperparameters of their own without disturbing what they, or the others, had.

    Each parameter goes to a group that copies a sibling group, ``overrides`` apart: a group that already is exactly
    that, or a new one. A group left empty stays, since optimizers and schedulers count by position. Optimizer state
    stays with its parameter, and schedulers treat the new group as they treat the sibling. Calling it again
    changes nothing (with ``lr_scale``, if ``like`` is given), and calling it in the same way on a fresh optimizer gives
    the groups that ``load_state_dict`` expects.

    Args:
        optimizer: Optimizer to change, in place.
        parameters: Parameters to move, whether the optimizer has them already or not. Names are needed only to add new
            ones to an optimizer built from named parameters.
        schedulers: All learning-rate schedulers (or Lightning's configurations of them); those of other optimizers are
            passed over, those inside ``SequentialLR`` and ``ChainedScheduler`` are found.
        like: Group to copy; by default the one each parameter is in, or the only one.
        lr_scale: Factor on every learning rate, now and in the schedulers.
        **overrides: Hyperparameters that differ, such as ``weight_decay=0.0``.

    Raises:
        MisconfigurationException: If a hyperparameter is unknown, set by a scheduler or is ``lr``; if a new parameter
            has no group to copy, or no name where the optimizer needs one; or if the optimizer allows one group only.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)
        >>> move_to_group(sgd, [net.bias], weight_decay=0.0)
        >>> [(len(group["params"]), group["weight_decay"]) for group in sgd.param_groups]
        [(1, 0.01), (1, 0.0)]
    """
    names, moved = _with_names(parameters)
    moves = [(p, _sibling(optimizer, p, like)) for p in moved]  # before anything moves
    _check_names(optimizer, [p for p, _ in moves if p not in names])
    groups = {sibling: _copy_group(optimizer, sibling, lr_scale, overrides) for _, sibling in moves}
    lists = group_lists(schedulers, optimizer)
    for sibling, group in groups.items():
        rows = {key: scaled(name, values[sibling], lr_scale) for key, (name, values) in lists.items()}
        target = _matching_group(optimizer, sibling, group, rows, lists)
        if target is None:
            target = _add_group(optimizer, group, rows, lists)
        for parameter in [p for p, its_sibling in moves if its_sibling == sibling]:
            _move(optimizer, parameter, target, names.get(parameter))


def place_parameters(
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    parameters: Iterable[nn.Parameter] | Mapping[str, nn.Parameter],
    sibling: nn.Parameter,
    overrides: Mapping[str, Any],
    lr_scale: float = 1.0,
) -> None:
    """See that parameters a method added are trained like the weight they belong to, ``overrides`` apart.

    Parameters in no optimizer join the one that trains ``sibling``; if none does, they stay out like it. Parameters that
    ``configure_optimizers`` has picked up stay with their optimizer, and in their group unless there is something to
    override; then they copy the sibling's group if it is in the same optimizer, else their own.

    Raises:
        MisconfigurationException: As :func:`move_to_group`.

    Example:
        >>> net, scale = nn.Linear(2, 1), nn.Parameter(torch.ones(()))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)
        >>> place_parameters([sgd], [], [scale], net.weight, {"weight_decay": 0.0})
        >>> [(len(group["params"]), group["weight_decay"]) for group in sgd.param_groups]
        [(2, 0.01), (1, 0.0)]
    """
    home = owner(optimizers, sibling)
    names, members = _with_names(parameters)
    for parameter in members:
        current = owner(optimizers, parameter)
        place = current or home
        if place is None or (current is not None and not overrides and lr_scale == 1.0):
            continue
        like = home[1] if home is not None and home[0] == place[0] else None
        one = {names[parameter]: parameter} if parameter in names else [parameter]
        move_to_group(optimizers[place[0]], one, schedulers, like=like, lr_scale=lr_scale, **overrides)


def _with_names(
    parameters: Iterable[nn.Parameter] | Mapping[str, nn.Parameter],
) -> tuple[dict[nn.Parameter, str], list[nn.Parameter]]:
    if isinstance(parameters, Mapping):
        return {parameter: name for name, parameter in parameters.items()}, list(parameters.values())
    return {}, list(parameters)


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> int | None:
    groups = enumerate(optimizer.param_groups)
    return next((index for index, group in groups if any(p is parameter for p in group["params"])), None)


def _sibling(optimizer: Optimizer, parameter: nn.Parameter, like: int | None) -> int:
    count = len(optimizer.param_groups)
    if like is not None:
        if not 0 <= like < count:
            raise MisconfigurationException(f"like={like}: {type(optimizer).__name__} has groups 0 to {count - 1}.")
        return like
    current = _group_of(optimizer, parameter)
    if current is None and count > 1:
        raise MisconfigurationException(
            f"A parameter of shape {tuple(parameter.shape)} is in no group of {type(optimizer).__name__}, which has "
            f"{count}. Say which group to copy: like=0 to like={count - 1}."
        )
    return current or 0


def _copy_group(optimizer: Optimizer, sibling: int, lr_scale: float, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters of a sibling group with the overrides; no parameters yet."""
    group = {
        key: scaled(key, value, lr_scale)
        for key, value in optimizer.param_groups[sibling].items()
        if key not in ("params", "param_names")
    }
    for key, value in overrides.items():
        if key == "weight_decay" and key not in group and value == 0:
            continue  # Rprop and others have no weight decay to switch off
        _check_override(optimizer, group, key)
        group[key] = value
    return group


def _check_override(optimizer: Optimizer, group: Mapping[str, Any], key: str) -> None:
    if is_learning_rate(key):
        raise MisconfigurationException(f"{key} follows the scheduler; give lr_scale=, a factor on it, instead.")
    if key not in group:
        near = ", ".join(difflib.get_close_matches(key, group, n=3)) or ", ".join(group)
        raise MisconfigurationException(f"{type(optimizer).__name__} has no hyperparameter {key!r}. Nearest: {near}.")
    if key in ("momentum", "betas") and "max_momentum" in group:
        raise MisconfigurationException(
            f"{key} is set by the scheduler at every step; build the scheduler with cycle_momentum=False to choose it."
        )


def _matching_group(
    optimizer: Optimizer, sibling: int, group: Mapping[str, Any], rows: Mapping[int, Any], lists: GroupLists
) -> int | None:
    """Group that already has these hyperparameters, for the optimizer and its schedulers; the sibling if it can be."""
    for index in sorted(range(len(optimizer.param_groups)), key=lambda i: i != sibling):
        other = optimizer.param_groups[index]
        keys = set(other) - {"params", "param_names"}
        same = keys == set(group) and all(_equal(other[key], group[key]) for key in keys)
        if same and all(_equal(values[index], rows[key]) for key, (_, values) in lists.items()):
            return index
    return None


def _add_group(optimizer: Optimizer, group: dict[str, Any], rows: Mapping[int, Any], lists: GroupLists) -> int:
    if isinstance(innermost(optimizer), torch.optim.LBFGS):
        differ = [key for key, value in group.items() if not _equal(value, optimizer.param_groups[0].get(key))]
        raise MisconfigurationException(
            f"LBFGS allows a single parameter group, so no parameters can have a value of {', '.join(differ)} of their own. "
            f"Give them that of the others{' (lr_scale=1)' if 'lr' in differ else ''}, or use another optimizer."
        )
    has_names = "param_names" in optimizer.param_groups[0]
    optimizer.add_param_group({**group, "params": [], **({"param_names": []} if has_names else {})})
    for key, (_, values) in lists.items():
        values.append(rows[key])
    return len(optimizer.param_groups) - 1


def _check_names(optimizer: Optimizer, nameless: Iterable[nn.Parameter]) -> None:
    if "param_names" in optimizer.param_groups[0] and any(_group_of(optimizer, p) is None for p in nameless):
        raise MisconfigurationException(
            "The optimizer was built from named parameters; pass the new ones as {name: parameter}."
        )


def _move(optimizer: Optimizer, parameter: nn.Parameter, target: int, name: str | None) -> None:
    source = _group_of(optimizer, parameter)
    if source == target:
        return
    new = optimizer.param_groups[target]
    if source is not None:
        old = optimizer.param_groups[source]
        position = next(i for i, p in enumerate(old["params"]) if p is parameter)
        del old["params"][position]
        if "param_names" in old:
            name = old["param_names"].pop(position)
    if "param_names" in new:
        new["param_names"].append(name)
    new["params"].append(parameter)
    init_late_state(optimizer, parameter, new)


def init_late_state(optimizer: Optimizer, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
    """Make the state of a parameter that joins late where an optimizer would not: Adagrad makes it in its constructor only."""
    if not isinstance(innermost(optimizer), torch.optim.Adagrad) or optimizer.state.get(parameter):
        return
    start = group["initial_accumulator_value"]
    fill = complex(start, start) if parameter.is_complex() else start
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if group.get("fused") else "cpu")
    optimizer.state[parameter] = {"step": step, "sum": torch.full_like(parameter, fill, requires_grad=False)}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, (Tensor, float, int)) and isinstance(b, (Tensor, float, int)) and bool(a == b)
    return bool(a is b or a == b)
