"""Optimizer state across a change of width, to more coordinates or to fewer."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.structure.axes import Axes, Rule, resized
from lightning_peft.structure.edit_types import ResizeEdit, ResizeEntry, SliceEdit, SliceEntry
from lightning_peft.structure.slices import narrow


def carry_state(state: Tensor, entry: ResizeEntry, axes: Axes, rule: Rule, key: str = "") -> Tensor:
    """Bring one tensor of a parameter's optimizer state to the parameter's new sizes.

    Besides states of the parameter's shape, these are known: scalars, factored second moments that keep a dimension of size 1
    (``torch.optim.Adafactor``) and those that drop it (timm and transformers: ``exp_avg_sq_row``, ``exp_avg_sq_col``).

    Args:
        state: The state.
        entry: The parameter's entry in ``edit["tensors"]``.
        axes: ``edit["axes"]``.
        rule: See :func:`~lightning_peft.structure.axes.resized`.
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
    dims = [entry["dims"][dim] if dim is not None else "" for dim in state_dims(state, entry["from"], key)]
    return resized(state, dims, axes, rule)


def slice_state(state: Tensor, entry: SliceEntry, key: str = "") -> Tensor:
    """Cut one tensor of a parameter's optimizer state like the parameter; the same kinds of state are known.

    Args:
        state: The state.
        entry: The parameter's entry in the ``"tensors"`` of a slice.
        key: Name of the state.

    Raises:
        MisconfigurationException: The state has another shape.

    Example:
        >>> slice_state(Tensor([[1.0], [2.0]]), {"from": [2, 3], "to": [1, 3], "kept": [[[1, 2]], None]})
        tensor([[2.]])
    """
    return narrow(state, [entry["kept"][dim] if dim is not None else None for dim in state_dims(state, entry["from"], key)])


def state_dims(state: Tensor, old: Sequence[int], key: str) -> list[int | None]:
    """Say which dimension of a parameter each dimension of an optimizer state is, ``None`` for none.

    Args:
        state: The state.
        old: Shape of the parameter it belongs to.
        key: Name of the state.

    Raises:
        MisconfigurationException: Its shape is not known.

    Example:
        >>> state_dims(Tensor(3), [2, 3], "exp_avg_sq_col"), state_dims(Tensor(2, 1), [2, 3], "row_var")
        ([1], [0, None])
    """
    shape = list(state.shape)
    if state.numel() == 1 and len(shape) != len(old):
        return [None] * len(shape)
    if len(shape) == len(old) and all(now in (1, then) for now, then in zip(shape, old, strict=True)):
        return [dim if now == then else None for dim, (now, then) in enumerate(zip(shape, old, strict=True))]
    last = len(old) - 1
    factored = {"row": [*range(last)], "col": [*range(last - 1), last]}
    fits = {name: dims for name, dims in factored.items() if shape == [old[dim] for dim in dims]}
    chosen: Sequence[int] | None = next((dims for name, dims in fits.items() if name in key), None)
    if chosen is None and len(fits) == 1:
        (chosen,) = fits.values()
    if chosen is None:
        raise MisconfigurationException(
            f"The optimizer keeps a state {key!r} of shape {shape} for a parameter of shape {list(old)}, which cannot be "
            'carried over a change of width. Use optimizer_state="reset".'
        )
    return list(chosen)


def carry_optimizer_state(state: MutableMapping[str, Any], edit: ResizeEdit | SliceEdit, name: str, rule: Rule) -> None:
    """Bring everything an optimizer keeps about one parameter to the parameter's new sizes; all of it or nothing.

    Args:
        state: ``optimizer.state[parameter]``, changed in place.
        edit: The edit.
        name: Qualified name of the parameter in ``edit["tensors"]``.
        rule: See :func:`~lightning_peft.structure.axes.resized`.

    Raises:
        MisconfigurationException: A state has a shape that is not known (see :func:`carry_state`).
    """
    for key, value in state.items():
        if isinstance(value, (list, tuple, dict)) and value:
            raise MisconfigurationException(
                f"The optimizer keeps a {type(value).__name__} {key!r} for {name}, which cannot be carried over a change of "
                'width. Use optimizer_state="reset".'
            )
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if edit["op"] == "slice":
        cut = edit["tensors"][name]
        state.update({key: slice_state(value, cut, key) for key, value in tensors.items()})
    else:
        grown, axes = edit["tensors"][name], edit["axes"]
        state.update({key: carry_state(value, grown, axes, rule, key) for key, value in tensors.items()})
