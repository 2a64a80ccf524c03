"""N:M masks by magnitude: n kept of every m consecutive weights. Pure functions, no state."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.weights.nm_kernels import eager_kernel, magnitude_keys, traced_kernel
from lightning_peft.weights.nm_layout import group_rows, group_view, remainder
from lightning_peft.weights.nm_pattern import check_pattern, geometric_frames, parse_pattern, stepwise_frames
from lightning_peft.weights.nm_prune import decay_exponential, decay_linear, ste_prune

__all__ = [
    "compile_masks",
    "decay_exponential",
    "decay_linear",
    "geometric_frames",
    "is_nm",
    "nm_mask",
    "nm_masks",
    "nm_violations",
    "parse_pattern",
    "ste_prune",
    "stepwise_frames",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Policy:
    """Process-wide choice for ``nm_mask(compiled=None)`` and what was learnt about the compiler."""

    compiled = False
    broken: set[str] = set()


def compile_masks(enabled: bool = True) -> None:
    """Choose what ``nm_mask(compiled=None)`` does from now on in this process.

    Off at first: compiling takes seconds per pattern and needs a C++ compiler (CPU) or Triton (GPU).
    """
    _Policy.compiled = enabled


def nm_mask(weight: Tensor, n: int, m: int, dim: int = -1, *, compiled: bool | None = None) -> Tensor:
    """Mask that keeps the ``n`` largest magnitudes of every ``m`` consecutive entries along ``dim``.

    An entry stays if fewer than ``n`` entries of its group beat it: by a larger magnitude, or by an equal one at a later
    index. So ties are decided as a stable ascending sort would that prunes the first ``m - n`` (Zhou et al., "Learning
    N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021), but nothing is sorted. NaN counts as
    the largest magnitude: it is kept and stays visible. An incomplete last group stays dense. Inside a user's
    ``torch.compile`` the function is traced without a graph break, whatever ``compiled`` says.

    Args:
        weight: Floating point tensor (float16, bfloat16, float32, float64) of any layout, at least one dimension.
        n: Entries kept per group.
        m: Group size.
        dim: Dimension along which groups run (see :func:`~lightning_peft.network.nm_layers.input_dim`).
        compiled: ``True`` runs a kernel from ``torch.compile``, made once per pattern for all shapes; should compiling
            fail, the eager kernel serves from then on, after one warning. ``False`` runs the eager kernel. ``None``
            follows :func:`compile_masks` (eager at first).

    Returns:
        Boolean tensor of the weight's shape, ``True`` where the entry is kept.

    Raises:
        MisconfigurationException: On an impossible pattern, a weight that is not floating point, or a bad ``dim``.

    Example:
        >>> nm_mask(torch.tensor([0.1, -0.4, 0.3, 0.2]), 2, 4)
        tensor([False,  True,  True, False])
        >>> nm_mask(torch.ones(6), 2, 4)
        tensor([False, False,  True,  True,  True,  True])
    """
    check_pattern(n, m)
    _check_weight(weight, dim)
    weight = weight.detach()
    if weight.is_meta:
        return torch.empty_like(weight, dtype=torch.bool)
    groups = group_rows(weight, m, dim)
    if n == m or groups.numel() == 0:
        return torch.ones_like(weight, dtype=torch.bool)
    return _laid_out(_run(groups, n, compiled), weight, m, dim)


def nm_masks(weights: Sequence[Tensor], n: int, m: int, dims: Sequence[int]) -> list[Tensor]:
    """Masks of several weights, each the one that :func:`nm_mask` makes of it, in one pass for all: small ones take no longer.

    Args:
        weights: Weights of one type on one device. Their groups are copied into one tensor.
        n: Entries kept per group.
        m: Group size.
        dims: Dimension of each weight along which groups run.

    Returns:
        Masks in the order of the weights. Together they are one tensor, which stays as long as one of them.

    Example:
        >>> [mask.tolist() for mask in nm_masks([torch.tensor([1.0, 2.0]), torch.tensor([4.0, 3.0])], 1, 2, [0, 0])]
        [[False, True], [True, False]]
    """
    rows = [group_rows(weight.detach(), m, dim) for weight, dim in zip(weights, dims, strict=True)]
    if n == m or not all(map(len, rows)):
        return [nm_mask(weight, n, m, dim) for weight, dim in zip(weights, dims, strict=True)]
    kept = _run(torch.cat(rows), n, None).split_with_sizes([len(each) for each in rows])
    return [_laid_out(part, weight, m, dim) for part, weight, dim in zip(kept, weights, dims, strict=True)]


def _laid_out(kept: Tensor, weight: Tensor, m: int, dim: int) -> Tensor:
    """Bring rows of groups into the layout of the weight they are from."""
    if kept.numel() == weight.numel() and weight.is_contiguous() and dim in (-1, weight.ndim - 1):
        return kept.view(weight.shape)
    kept = kept.view(group_view(weight, m, dim).shape).flatten(-2)
    dense = remainder(weight.shape[dim], m)
    if dense:
        kept = torch.cat((kept, kept.new_ones((*kept.shape[:-1], dense))), dim=-1)
    kept = kept.movedim(-1, dim)
    if torch.compiler.is_compiling() or kept.stride() == weight.stride():
        return kept
    return torch.empty_like(weight, dtype=torch.bool).copy_(kept)


def nm_violations(weight: Tensor, n: int, m: int, dim: int = -1) -> int:
    """Number of complete groups along ``dim`` with more than ``n`` nonzero entries (NaN is nonzero).

    Example:
        >>> nm_violations(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 1.0]), 2, 4)
        1
    """
    check_pattern(n, m)
    return int((group_view(weight.detach(), m, dim).count_nonzero(-1) > n).sum())


def is_nm(weight: Tensor, n: int, m: int, dim: int = -1) -> bool:
    """Whether every complete group along ``dim`` has at most ``n`` nonzero entries.

    Example:
        >>> is_nm(torch.tensor([1.0, 0.0, 3.0, 0.0]), 2, 4)
        True
    """
    return nm_violations(weight, n, m, dim) == 0


def _check_weight(weight: Tensor, dim: int) -> None:
    if weight.dtype not in _FLOATS:
        raise MisconfigurationException(
            f"nm_mask needs a float16, bfloat16, float32 or float64 weight, got {weight.dtype}. "
            "Convert it first (weight.float()), or leave this layer out of the targets."
        )
    if not -weight.ndim <= dim < weight.ndim:
        raise MisconfigurationException(
            f"dim={dim} is not a dimension of a weight of shape {tuple(weight.shape)}. "
            "Use input_dim(layer), or a dim within the weight's dimensions."
        )


def _run(groups: Tensor, n: int, compiled: bool | None) -> Tensor:
    if torch.compiler.is_compiling():
        return traced_kernel(magnitude_keys(groups), n)
    wanted = _Policy.compiled if compiled is None else compiled
    if wanted and groups.device.type not in _Policy.broken:
        try:
            with torch.no_grad():
                return _compiled_kernel(n, groups.shape[1])(groups)
        except Exception as error:  # whatever a missing or broken toolchain raises: the mask does not depend on it
            _Policy.broken.add(groups.device.type)
            warnings.warn(
                f"torch.compile failed on {groups.device.type} ({type(error).__name__}: {str(error)[:200]}); N:M masks are "
                "made by the eager kernels from now on. Install a C++ compiler (CPU) or Triton (GPU), or pass "
                "compiled=False.",
                RuntimeWarning,
                stacklevel=3,
            )
    return eager_kernel(magnitude_keys(groups), n)


@functools.cache
def _compiled_kernel(n: int, m: int) -> Callable[[Tensor], Tensor]:
    def kernel(groups: Tensor) -> Tensor:
        return traced_kernel(magnitude_keys(groups), n)

    # Dynamo limits recompilations per code object, so each pattern gets its own: many patterns, one limit each.
    code = kernel.__code__.replace(co_name=f"nm_mask_{n}_{m}")
    fresh = types.FunctionType(code, kernel.__globals__, code.co_name, None, kernel.__closure__)
    compiled: Callable[[Tensor], Tensor] = torch.compile(fresh, fullgraph=True, dynamic=True)
    return compiled
