"""Along which dimension of a layer's weight the N:M groups run, and how a dimension splits into groups."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

_SUPPORTED = "Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d/2d/3d (groups=1), transformers' Conv1D"


def input_dim(module: nn.Module) -> int:
    """Dimension of ``module.weight`` that runs over the inputs, where N:M groups lie.

    ``Linear`` (out, in) and ``Conv*d`` (out, in / groups, ...) group along dimension 1 (for convolutions the same groups
    as in the channels-last memory that hardware reads), ``ConvTranspose*d`` (in, out, ...) and transformers' ``Conv1D``
    (in, out) along dimension 0.

    Args:
        module: A layer with a ``weight``.

    Returns:
        The dimension's index, 0 or 1.

    Raises:
        MisconfigurationException: If the layer has no N:M layout; the message lists the supported types.

    Example:
        >>> input_dim(nn.Linear(8, 4)), input_dim(nn.ConvTranspose2d(8, 4, 3))
        (1, 0)
    """
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 1
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) and module.groups == 1:
        return 0
    # By name, so that transformers need not be importable; torch's own class is spelt Conv1d.
    if any(base.__name__ == "Conv1D" for base in type(module).__mro__) and hasattr(module, "nf"):
        return 0
    raise MisconfigurationException(
        f"No N:M layout for a layer of type {type(module).__name__}. Supported: {_SUPPORTED}. "
        "Leave this layer out of the targets (or put it in exclude=)."
    )


def inputs(module: nn.Module) -> int:
    """Size of that dimension.

    Example:
        >>> inputs(nn.Linear(8, 4))
        8
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[input_dim(module)]


def remainder(size: int, m: int) -> int:
    """Entries at the end of a dimension that fill no whole group of ``m`` and so stay dense.

    Example:
        >>> remainder(10, 4)
        2
    """
    return size % m


def group_view(weight: Tensor, m: int, dim: int = -1) -> Tensor:
    """View the complete groups of ``m`` consecutive entries along ``dim``.

    Args:
        weight: Any tensor of at least one dimension.
        m: Group size.
        dim: Dimension along which the groups run.

    Returns:
        A view (never a copy) of shape ``(*other dims, weight.shape[dim] // m, m)``; an incomplete last group is left out.

    Example:
        >>> import torch
        >>> group_view(torch.arange(6).reshape(6, 1), 4, dim=0)
        tensor([[[0, 1, 2, 3]]])
    """
    moved = weight.movedim(dim, -1)
    size = moved.shape[-1]
    return moved.narrow(-1, 0, size - remainder(size, m)).view(*moved.shape[:-1], size // m, m)


def density(mask: Tensor) -> float:
    """Share of nonzero entries; 1.0 for an empty tensor.

    Example:
        >>> import torch
        >>> density(torch.tensor([True, False, False, True]))
        0.5
    """
    return int(mask.count_nonzero()) / mask.numel() if mask.numel() else 1.0
