"""Proof that stored weights are N:M sparse: counted from the numbers themselves, not from a method's masks."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.network.nm_layers import input_dim
from lightning_peft.weights.nm import parse_pattern
from lightning_peft.weights.nm_layout import density, group_view, remainder

Pattern = str | tuple[int, int]


@dataclass(frozen=True)
class NMProof:
    """Counts of one weight.

    Attributes:
        name: Layer name in the module, or key in the state dict.
        shape: Shape of the weight.
        n: Nonzeros allowed per group.
        m: Group size.
        groups: Complete groups in the weight.
        violations: Groups with more than ``n`` nonzeros.
        exact_groups: Groups with exactly ``n`` nonzeros.
        remainder: Entries along the grouped dimension that fill no group and are dense.
        density: Share of nonzeros in the whole weight, remainder included.
        mask_sha256: Digest of the nonzero pattern: row-major, 8 entries a byte, first entry in the highest bit.
    """

    name: str
    shape: tuple[int, ...]
    n: int
    m: int
    groups: int
    violations: int
    exact_groups: int
    remainder: int
    density: float
    mask_sha256: str

    @property
    def holds(self) -> bool:
        """Whether no group has more than ``n`` nonzeros, and there is a group at all."""
        return self.violations == 0 and self.groups > 0


def prove_nm(module: nn.Module, patterns: Mapping[str, Pattern] | Pattern) -> list[NMProof]:
    """Count the groups of a module's layers; the module may be any ordinary one, e.g. after ``bake``.

    Args:
        module: Module with the layers.
        patterns: Pattern per layer name (as in ``named_modules``), or one pattern for every layer that has an N:M layout.

    Returns:
        One proof per layer, in the order of ``patterns`` (or of the module).

    Raises:
        MisconfigurationException: If a name is no layer with an N:M layout, or no layer is found.

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
        >>> [(proof.name, proof.violations, proof.density) for proof in prove_nm(nn.Sequential(layer), "2:4")]
        [('0', 0, 0.5)]
    """
    return [_prove(name, *target) for name, target in _module_targets(module, patterns).items()]


def prove_nm_state_dict(
    state_dict: Mapping[str, Tensor], patterns: Mapping[str, Pattern], dims: Mapping[str, int] | int = 1
) -> list[NMProof]:
    """Count the groups in plain tensors, e.g. of a file that no model code is at hand for.

    Args:
        state_dict: Name to tensor.
        patterns: Pattern per name.
        dims: Dimension along which groups run, one for all or one per name (1 suits ``Linear`` and ``Conv*d``).

    Returns:
        One proof per name, in the order of ``patterns``.

    Raises:
        MisconfigurationException: If a name is missing from ``state_dict`` or ``dims``.
    """
    return [_prove(name, *target) for name, target in _state_targets(state_dict, patterns, dims).items()]


def assert_nm(module: nn.Module, patterns: Mapping[str, Pattern] | Pattern) -> list[NMProof]:
    """:func:`prove_nm`, but raise at the first group that breaks its pattern.

    Raises:
        AssertionError: Names the layer, the group and its values.
        MisconfigurationException: As in :func:`prove_nm`.
    """
    return _assert(_module_targets(module, patterns))


def assert_nm_state_dict(
    state_dict: Mapping[str, Tensor], patterns: Mapping[str, Pattern], dims: Mapping[str, int] | int = 1
) -> list[NMProof]:
    """:func:`prove_nm_state_dict`, but raise at the first group that breaks its pattern.

    Raises:
        AssertionError: Names the tensor, the group and its values.
        MisconfigurationException: As in :func:`prove_nm_state_dict`.
    """
    return _assert(_state_targets(state_dict, patterns, dims))


_Target = tuple[Tensor, int, int, int]  # weight, n, m, dim


def _module_targets(module: nn.Module, patterns: Mapping[str, Pattern] | Pattern) -> dict[str, _Target]:
    layers = {name: (layer, dim) for name, layer in module.named_modules() if (dim := _dim_or_none(layer)) is not None}
    if not isinstance(patterns, Mapping):
        patterns = dict.fromkeys(layers, parse_pattern(patterns))
    if not patterns:
        raise MisconfigurationException(
            f"{type(module).__name__} has no layer to prove N:M sparsity of. Pass the module that holds the Linear or "
            "convolution layers, and name at least one of them."
        )
    targets: dict[str, _Target] = {}
    for name, pattern in patterns.items():
        if name not in layers:
            raise MisconfigurationException(
                f"No layer {name!r} with an N:M layout in {type(module).__name__}. {_nearest(name, layers)}"
            )
        layer, dim = layers[name]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        targets[name] = (weight, *parse_pattern(pattern), dim)
    return targets


def _state_targets(
    state_dict: Mapping[str, Tensor], patterns: Mapping[str, Pattern], dims: Mapping[str, int] | int
) -> dict[str, _Target]:
    targets: dict[str, _Target] = {}
    for name, pattern in patterns.items():
        if name not in state_dict:
            raise MisconfigurationException(f"No tensor {name!r} in the state dict. {_nearest(name, state_dict)}")
        if not isinstance(dims, int) and name not in dims:
            raise MisconfigurationException(f"dims has no entry for {name!r}. Add it (1 for Linear and Conv), or pass dims=1.")
        targets[name] = (state_dict[name], *parse_pattern(pattern), dims if isinstance(dims, int) else dims[name])
    return targets


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)[:3]
    return f"Nearest names: {', '.join(map(repr, close))}." if close else "There are no candidates at all."


def _dim_or_none(layer: nn.Module) -> int | None:
    try:
        return input_dim(layer)
    except MisconfigurationException:
        return None


def _prove(name: str, weight: Tensor, n: int, m: int, dim: int) -> NMProof:
    weight = weight.detach()
    nonzeros = group_view(weight, m, dim).count_nonzero(-1)
    packed = np.packbits((weight != 0).cpu().contiguous().numpy().reshape(-1))
    return NMProof(
        name=name,
        shape=tuple(weight.shape),
        n=n,
        m=m,
        groups=nonzeros.numel(),
        violations=int((nonzeros > n).sum()),
        exact_groups=int((nonzeros == n).sum()),
        remainder=remainder(weight.shape[dim], m),
        density=density(weight),
        mask_sha256=hashlib.sha256(packed.tobytes()).hexdigest(),
    )


def _assert(targets: dict[str, _Target]) -> list[NMProof]:
    proofs = []
    for name, (weight, n, m, dim) in targets.items():
        proof = _prove(name, weight, n, m, dim)
        if proof.groups == 0:
            raise AssertionError(
                f"{name}: dimension {dim} of {proof.shape} is smaller than M, so it has no {n}:{m} group and is dense. "
                "Leave it out of the patterns."
            )
        if proof.violations:
            groups = group_view(weight.detach(), m, dim)
            first = tuple(torch.nonzero(groups.count_nonzero(-1) > n)[0].tolist())
            raise AssertionError(
                f"{name} is not {n}:{m} sparse along dimension {dim}: {proof.violations} of {proof.groups} groups have more "
                f"than {n} nonzeros, first group {first} of {tuple(groups.shape[:-1])} (grouped dimension last): "
                f"{groups[first].tolist()}"
            )
        proofs.append(proof)
    return proofs
