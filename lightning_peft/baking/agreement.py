"""Whether an exported network computes what the eager one does, on the example and on another batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_peft.baking.plain_network import Inputs, batch_size, call, changed, has_batch, with_batch_size

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class ExportError(RuntimeError):
    """The exported program computes something else than the network, or could not be written."""


def other_inputs(inputs: Inputs, *, larger: bool) -> Inputs:
    """Make other inputs of the same kind, so that a graph that learnt the example by heart is found out.

    Samples come in the opposite order, which keeps token ids with their masks, and numbers are shifted by one along their last
    dimension.

    Args:
        inputs: The example.
        larger: Whether there is to be one sample more.
    """
    size = batch_size(inputs)
    more = with_batch_size(inputs, size + 1) if larger else inputs
    count = batch_size(more)

    def other(value: Any) -> Any:
        if not has_batch(value, count):
            return value
        turned = value.flip(0)
        return turned.roll(1, -1) if value.is_floating_point() else turned

    return changed(more, other)


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def largest_difference(wanted: Tensor, found: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest value wanted where that exceeds one.

    Values that are not finite must be the same.

    Example:
        >>> largest_difference(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0]))
        0.25
    """
    if wanted.shape != found.shape:
        return float("inf")
    if wanted.numel() == 0:
        return 0.0
    wanted, found = wanted.detach().cpu().double(), found.detach().cpu().double()
    usual = wanted.isfinite()
    if not torch.equal(wanted[~usual].nan_to_num(), found[~usual].nan_to_num()) or not found[usual].isfinite().all():
        return float("inf")
    if not usual.any():
        return 0.0
    scale = wanted[usual].abs().max().clamp_min(1.0)
    return float(((wanted - found)[usual].abs() / scale).max())


@torch.no_grad()
def check_agreement(
    network: nn.Module,
    run: Callable[[Inputs], list[Tensor]],
    examples: list[Inputs],
    what: str,
    tolerance: float | None = None,
) -> float:
    """Compare an exported network with the eager one.

    Args:
        network: The eager network.
        run: Runs the exported one; tensors in the order of the eager output.
        examples: Inputs to compare on.
        what: Name of the format, for the message.
        tolerance: Largest difference allowed, relative to the largest output where that exceeds one; by default 1e-4 in
            float32, more for shorter types.

    Returns:
        The largest difference found.

    Raises:
        ExportError: They differ by more.
    """
    largest = 0.0
    for example in examples:
        wanted, found = tensors_of(call(network, example)), run(example)
        place = f"batch size {batch_size(example)}"
        if len(wanted) != len(found):
            raise ExportError(f"The {what} has {len(found)} outputs where the network has {len(wanted)} ({place}).")
        for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
            error = largest_difference(one, other)
            allowed = TOLERANCE.get(one.dtype, 0.0) if tolerance is None else tolerance
            if not error <= allowed:
                raise ExportError(
                    f"The {what} does not compute what the network does: output {index} differs by up to {error:.3g} "
                    f"({place}, shape {tuple(one.shape)} against {tuple(other.shape)}; allowed is {allowed:.3g}). A network "
                    "that draws random numbers or branches on its values in evaluation mode cannot be exported faithfully; "
                    "to allow a larger difference, pass tolerance=."
                )
            largest = max(largest, error)
    return largest
