"""LiGO's short training: the growth operator is learnt on the loss of the network it grows (Wang et al., ICLR 2023).

The operator is a list with one dict for each edit: extra rows of the width matrices by product of axes for a width edit, depth
coefficients by kind of tensor (``"blocks.*.mlp.fc1.weight"``) for a depth edit. Only it is trained; the old weights stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.structure.block_names import block_name
from lightning_peft_plugins.growth._layer_growth.ligo import init_width, ligo_expand
from lightning_peft_plugins.growth._layer_growth.net2net import Edit
from lightning_peft_plugins.growth._layer_growth.used_values import Values

LigoOperator: TypeAlias = list[dict[str, Tensor]]


def init_coefficients(sources: Sequence[int], old: int, generator: torch.Generator, noise: float = 0.03) -> Tensor:
    """Depth coefficients that favour the source of every new layer, rows summing to 1.

    Args:
        sources: Old layer that each new one is most like.
        old: Number of old layers.
        generator: On the CPU.
        noise: Largest uniform noise on each coefficient; the official ``stackbert_noisy`` has 0.03.

    Returns:
        Shape ``(len(sources), old)``.

    Example:
        >>> init_coefficients([0, 0, 1], 2, torch.Generator(), noise=0.0)
        tensor([[1., 0.],
                [1., 0.],
                [0., 1.]])
    """
    rows = torch.eye(old)[list(sources)] + noise * torch.rand(len(sources), old, generator=generator)
    return rows / rows.sum(1, keepdim=True)


def init_operator(
    values: Values,
    edits: Sequence[Edit],
    generator: torch.Generator,
    *,
    kind: Literal["rand", "sel"] = "rand",
    noise: float = 0.03,
) -> LigoOperator:
    """First operator, on the device of the values.

    Args:
        values: Values before the first edit, by qualified name.
        edits: Edits of width and depth, in the order they are applied.
        generator: On the CPU.
        kind: See :func:`~lightning_peft_plugins.growth._layer_growth.ligo.init_extra`.
        noise: See :func:`init_coefficients`.
    """
    like = next(value for value in values.values() if value.is_floating_point())
    names, operator = list(values), []
    for edit in edits:
        if edit["op"] == "resize":
            first = init_width(edit, generator, kind)
        else:
            rests = _rests(names, edit)
            first = {}
            for rest in rests:
                holders = _holders(names, values, edit, rest)
                if (
                    len(holders) > (edit["from"] > 1)
                    and values.get(f"{block_name(edit, holders[0])}.{rest}", like).is_floating_point()
                ):
                    rows = init_coefficients(edit["sources"], edit["from"], generator, noise)
                    first[f"{edit['path']}.*.{rest}"] = rows if len(holders) == edit["from"] else _among(rows, holders)
            names += [f"{block_name(edit, place)}.{rest}" for rest in rests for place in range(len(edit["sources"]))]
        dtype = torch.promote_types(like.dtype, torch.float32)  # steps of Adam vanish in half precision
        operator.append({name: value.to(like.device, dtype) for name, value in first.items()})
    return operator


def materialised(values: Values, edits: Sequence[Edit], operator: LigoOperator) -> dict[str, Tensor]:
    """Values after all edits; differentiable in the operator.

    Args:
        values: Values before the first edit.
        edits: The edits.
        operator: From :func:`init_operator` or :func:`train_operator`.

    Returns:
        What the edits change: resized tensors and all tensors of the edited lists of blocks, by their last names.
    """
    found = dict(values)
    for edit, part in zip(edits, operator, strict=True):
        found |= ligo_expand(found, edit, part) if edit["op"] == "resize" else _mixed(found, edit, part)
    return {name: value for name, value in found.items() if value is not values.get(name)}


def train_operator(
    values: Values,
    edits: Sequence[Edit],
    loss_of: Callable[[dict[str, Tensor], int], Tensor],
    steps: int,
    lr: float,
    generator: torch.Generator,
    *,
    kind: Literal["rand", "sel"] = "rand",
    noise: float = 0.03,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> LigoOperator:
    """Learn the operator with Adam.

    Args:
        values: Values before the first edit.
        edits: The edits.
        loss_of: Loss of the grown network under given values, ``loss_of(values, step)``; values are what
            :func:`materialised` returns.
        steps: Number of steps; the paper takes 100.
        lr: Learning rate.
        generator: On the CPU; draws the first operator.
        kind: See :func:`init_operator`.
        noise: See :func:`init_operator`.
        reduce: Means a gradient over all ranks; needed in distributed training, where ranks see different batches.

    Returns:
        The operator, without a graph. Averaged copies of the network grow by the same one.

    Raises:
        MisconfigurationException: The loss is not finite, or does not depend on the values; no two blocks have a tensor alike.
    """
    operator = init_operator(values, edits, generator, kind=kind, noise=noise)
    parameters = [tensor.requires_grad_() for part in operator for tensor in part.values()]
    if not parameters:
        raise MisconfigurationException(
            "LiGO has nothing to mix: no two blocks have a tensor of one name and shape. Choose another operator."
        )
    adam = torch.optim.Adam(parameters, lr=lr)
    fixed = {name: value.detach() for name, value in values.items()}
    for step in range(steps):
        with torch.inference_mode(False), torch.enable_grad():
            loss = loss_of(materialised(fixed, edits, operator), step)
            _check(loss, step)
            # Not loss.backward(): gradients of what else the network holds are none of ours.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            parameter.grad = gradient if reduce is None else reduce(gradient)
        adam.step()
    return [{name: tensor.detach() for name, tensor in part.items()} for part in operator]


def _check(loss: Tensor, step: int) -> None:
    if not loss.requires_grad:
        raise MisconfigurationException(
            "The loss does not depend on the grown values. Compute it with torch.func.functional_call(module, values, ...)."
        )
    if not bool(loss.isfinite()):
        raise MisconfigurationException(f"The loss is {float(loss.detach())} at step {step} of LiGO. Lower its learning rate.")


def _rests(names: Iterable[str], edit: Edit) -> list[str]:
    """Names, within a block, of the tensors of old blocks."""
    starts = tuple(f"{block_name(edit, place)}." for place in range(edit["from"]))
    mine = (name.removeprefix(f"{edit['path']}.") for name in names if name.startswith(starts))
    return list(dict.fromkeys(name.partition(".")[2] for name in mine))


def _holders(names: Collection[str], values: Values, edit: Edit, rest: str) -> list[int]:
    """Old blocks that have a tensor, in the shape that most of them have; shapes are known before the first edit."""
    places = [place for place in range(edit["from"]) if f"{block_name(edit, place)}.{rest}" in names]
    known = [values.get(f"{block_name(edit, place)}.{rest}") for place in places]
    shapes = [None if value is None else value.shape for value in known]
    usual = max(shapes, key=shapes.count)
    return [place for place, shape in zip(places, shapes, strict=True) if shape == usual]


def _among(rows: Tensor, holders: Sequence[int]) -> Tensor:
    """Coefficients of those blocks alone, rows summing to 1 where there is something to mix."""
    kept = torch.zeros_like(rows)
    kept[:, holders] = rows[:, holders]
    return kept / kept.sum(1, keepdim=True)


def _mixed(values: Values, edit: Edit, coefficients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    path, new = edit["path"], {}
    for rest in _rests(values, edit):
        layers = {at: values[name] for at in range(edit["from"]) if (name := f"{block_name(edit, at)}.{rest}") in values}
        rows = coefficients.get(f"{path}.*.{rest}")
        for place, source in enumerate(edit["sources"]):
            if source not in layers:
                continue
            alike = [at for at, layer in layers.items() if layer.shape == layers[source].shape]
            row = None if rows is None else rows[place, alike].to(layers[source])
            if row is None or not bool(row.any()):  # blocks of a shape that few have are no mixtures
                new[f"{block_name(edit, place)}.{rest}"] = layers[source]
            else:
                new[f"{block_name(edit, place)}.{rest}"] = torch.tensordot(row, torch.stack([layers[at] for at in alike]), 1)
    return new
