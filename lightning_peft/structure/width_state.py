"""Optimizer state across a change of width."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.structure.axes import Axes, Rule, carry


def carry_state(state: Tensor, entry: Mapping[str, Any], axes: Axes, rule: Rule, key: str = "") -> Tensor:
    """Bring one tensor of a parameter's optimizer state to the parameter's new sizes.

    Besides states of the parameter's shape, these are known: scalars, factored second moments that keep a dimension of size 1
    (``torch.optim.Adafactor``) and those that drop it (timm and transformers: ``exp_avg_sq_row``, ``exp_avg_sq_col``).

    Args:
        state: The state.
        entry: The parameter's entry in ``edit["tensors"]``.
        axes: ``edit["axes"]``.
        rule: See :func:`~lightning_peft.structure.axes.carry`.
        key: Name of the state, to tell rows from columns of a square parameter.

    Returns:
        The state in its new shape; a state that does not change is returned as it is.

    Raises:
        MisconfigurationException: The state has another shape.

    Example:
        >>> entry = {"dims": ["width", "3"], "from": [2, 3], "to": [4, 3]}
        >>> carry_state(Tensor([[1.0], [2.0]]), entry, {"width": [2, 4]}, "copy").flatten()
        tensor([1., 2., 1., 2.])
    """
    old, dims = entry["from"], list(entry["dims"])
    shape = list(state.shape)
    if state.numel() == 1 and len(shape) != len(old):
        return state
    if len(shape) == len(old) and all(now in (1, then) for now, then in zip(shape, old, strict=True)):
        return carry(state, [dim if now == then else "" for dim, now, then in zip(dims, shape, old, strict=True)], axes, rule)
    factored = {"row": (old[:-1], dims[:-1]), "col": ([*old[:-2], old[-1]], [*dims[:-2], dims[-1]])}
    fits = {name: part for name, (sizes, part) in factored.items() if shape == sizes}
    chosen = next((part for name, part in fits.items() if name in key), None)
    if chosen is None and len(fits) == 1:
        (chosen,) = fits.values()
    if chosen is None:
        raise MisconfigurationException(
            f"The optimizer keeps a state {key!r} of shape {shape} for a parameter of shape {old}, which cannot be carried "
            'over a change of width. Use optimizer_state="reset".'
        )
    return carry(state, chosen, axes, rule)


def carry_optimizer_state(state: MutableMapping[str, Any], edit: Mapping[str, Any], name: str, rule: Rule) -> None:
    """Bring everything an optimizer keeps about one parameter to the parameter's new sizes; all of it or nothing.

    Args:
        state: ``optimizer.state[parameter]``, changed in place.
        edit: The edit.
        name: Qualified name of the parameter in ``edit["tensors"]``.
        rule: See :func:`~lightning_peft.structure.axes.carry`.

    Raises:
        MisconfigurationException: A state has a shape that is not known (see :func:`carry_state`).
    """
    entry, axes = edit["tensors"][name], edit["axes"]
    for key, value in state.items():
        if isinstance(value, (list, tuple, dict)) and value:
            raise MisconfigurationException(
                f"The optimizer keeps a {type(value).__name__} {key!r} for {name}, which cannot be carried over a change of "
                'width. Use optimizer_state="reset".'
            )
    state.update({key: carry_state(value, entry, axes, rule, key) for key, value in state.items() if isinstance(value, Tensor)})
