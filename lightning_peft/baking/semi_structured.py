"""2:4 sparse linear layers as PyTorch's semi-structured tensors, which sparse tensor cores of CUDA devices multiply.

PyTorch packs a weight that is 2:4 already and leaves everything else to the caller: what cannot be packed raises at the first
layer, and what is not 2:4 is packed wrongly. Here each layer is judged first, by :func:`choose_backend`, and stays dense, with
the reason, when it cannot be packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.baking.nm_proof import prove_nm
from lightning_peft.network.plain_class import plain_class
from lightning_peft.network.targets import TargetSpec, select
from lightning_peft.weights.mapped_layer import is_mapped

PATTERN = (2, 4)

# Rows and columns of which a packed half-precision weight must be a multiple, as PyTorch's classes have them.
MULTIPLES = {"cusparselt": (16, 16), "cutlass": (32, 64)}

# A packed product adds in another order; a wrongly packed one is off by whole weights.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class SparseDevice:
    """Support of a device for 2:4 products.

    Attributes:
        kind: Its type: ``"cuda"``, ``"cpu"``.
        capability: Compute capability of a CUDA device.
        cusparselt: Whether PyTorch was built with cuSPARSELt.
    """

    kind: str
    capability: tuple[int, int] = (0, 0)
    cusparselt: bool = False

    @classmethod
    def of(cls, device: torch.device) -> SparseDevice:
        """Ask PyTorch about a device."""
        if device.type != "cuda" or torch.version.cuda is None:
            return cls("rocm" if device.type == "cuda" else device.type)
        return cls("cuda", torch.cuda.get_device_capability(device), bool(torch.backends.cusparselt.is_available()))


@dataclass(frozen=True)
class SparseWeight:
    """Facts about a linear layer that decide whether its weight is packed.

    Attributes:
        shape: ``(outputs, inputs)``.
        dtype: Type the packed weight would have.
        violations: Groups of four inputs with more than two non-zero weights.
        layer: Class name when the layer is no plain ``nn.Linear``.
        parametrized: Whether a weight map or another parametrization stands on the weight.
        tied: Another name of the same parameter.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    violations: int = 0
    layer: str = ""
    parametrized: bool = False
    tied: str = ""


@dataclass(frozen=True)
class SparseLayer:
    """Outcome for one layer.

    Attributes:
        name: Qualified name.
        shape: Shape of its weight.
        backend: ``"cusparselt"`` or ``"cutlass"`` when it was packed, else empty.
        reason: Why it stayed dense.
    """

    name: str
    shape: tuple[int, ...]
    backend: str = ""
    reason: str = ""


@dataclass(frozen=True)
class SemiStructuredReport:
    """Outcomes for every layer that was considered."""

    layers: tuple[SparseLayer, ...]

    @property
    def converted(self) -> list[SparseLayer]:
        """Layers that are packed now."""
        return [layer for layer in self.layers if layer.backend]

    @property
    def dense(self) -> list[SparseLayer]:
        """Layers that stayed as they were."""
        return [layer for layer in self.layers if not layer.backend]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} of {len(self.layers)} linear layers are 2:4 packed"]
        lines += [f"  {layer.name}: {layer.backend or f'dense, {layer.reason}'}" for layer in self.layers]
        return "\n".join(lines)


def choose_backend(weight: SparseWeight, device: SparseDevice) -> tuple[str, str]:
    """Decide from facts alone which backend can multiply a weight.

    Args:
        weight: The weight.
        device: The device.

    Returns:
        Backend and nothing, or nothing and the reason.

    Example:
        >>> h100 = SparseDevice("cuda", (9, 0), cusparselt=True)
        >>> choose_backend(SparseWeight((64, 48), torch.float16), h100)
        ('cusparselt', '')
        >>> choose_backend(SparseWeight((64, 50), torch.float16), h100)[1]
        '64 x 50 is not a multiple of 16 x 16, which cusparselt needs'
    """
    backend, reason = _backend_of(device)
    return (backend, "") if not (reason := reason or _refusal(weight, backend)) else ("", reason)


def why_dense(layer: nn.Module) -> str:
    """Say why a layer stays dense on a GPU of today, where it does: none but linear layers of some sizes are packed.

    Example:
        >>> why_dense(nn.Linear(32, 64)), why_dense(nn.Linear(32, 10)), why_dense(nn.Conv2d(32, 64, 1))
        ('', '10 outputs', 'Conv2d')
    """
    kind = plain_class(layer)
    if kind is not nn.Linear:
        return kind.__name__
    rows, columns = MULTIPLES["cusparselt"]
    outputs, inputs = layer.weight.shape  # type: ignore[misc]
    return ", ".join([f"{outputs} outputs"] * bool(outputs % rows) + [f"{inputs} inputs"] * bool(inputs % columns))


def _backend_of(device: SparseDevice) -> tuple[str, str]:
    if device.kind != "cuda":
        return "", f"the module is on {device.kind}: sparse products need an NVIDIA GPU"
    major, minor = device.capability
    if major < 8:
        return "", f"compute capability {major}.{minor} has no sparse tensor cores (8.0 and later have)"
    if device.cusparselt:
        return "cusparselt", ""
    if major == 8:
        return "cutlass", ""
    return "", f"this PyTorch has no cuSPARSELt, and its CUTLASS kernels are for compute capability 8.x, not {major}.{minor}"


def _refusal(weight: SparseWeight, backend: str) -> str:
    if weight.layer:
        return f"{weight.layer} may read its weight in ways a packed one does not support"
    if weight.parametrized:
        return "a parametrization stands on the weight: bake the module first"
    if weight.tied:
        return f"tied to {weight.tied}, which would no longer be the same parameter"
    if weight.dtype not in _TOLERANCE:
        return f"{_name(weight.dtype)} is not supported: pass dtype=torch.float16 or torch.bfloat16"
    rows, columns = MULTIPLES[backend]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"{weight.shape[0]} x {weight.shape[1]} is not a multiple of {rows} x {columns}, which {backend} needs"
    if weight.violations:
        return f"not 2:4: {weight.violations} groups of four have more than two non-zero weights"
    return ""


def semi_structured(
    module: nn.Module,
    dtype: torch.dtype | None = None,
    targets: TargetSpec = "all-linear",
    exclude: TargetSpec | None = None,
) -> SemiStructuredReport:
    """Pack the 2:4 linear layers of a baked module, in place; what cannot be packed stays dense.

    A packed layer is for inference: its weight does not train, is not saved by ``state_dict`` in a way that loads elsewhere,
    and does not move to the CPU. Save first. After packing, each layer is run on random numbers; one that is refused by its
    kernel, or gives other results than before, is dense again.

    Args:
        module: A baked module on a CUDA device.
        dtype: ``torch.float16`` or ``torch.bfloat16``: the whole module is converted to it, if any layer can be packed then.
            ``None`` takes the weights as they are.
        targets: Layers to look at, in the grammar of :func:`lightning_peft.network.targets.select`.
        exclude: Layers to leave alone, same grammar.

    Returns:
        What became of each layer, with the reason where it stayed dense.

    Raises:
        MisconfigurationException: ``targets`` names nothing; nothing else raises.

    Example:
        >>> layer = nn.Sequential(nn.Linear(16, 16))
        >>> print(semi_structured(layer, torch.float16))
        0 of 1 linear layers are 2:4 packed
          0: dense, the module is on cpu: sparse products need an NVIDIA GPU
    """
    chosen = {name: layer for name, layer in select(module, targets, exclude).items() if isinstance(layer, nn.Linear)}
    facts = {name: _facts(module, name, layer, dtype) for name, layer in chosen.items()}
    verdicts = {name: choose_backend(facts[name], SparseDevice.of(layer.weight.device)) for name, layer in chosen.items()}
    if dtype is not None and any(backend for backend, _ in verdicts.values()):
        module.to(dtype)
    layers = []
    for name, layer in chosen.items():
        backend, reason = verdicts[name]
        if backend and (reason := _pack(layer, backend)):
            backend = ""
        layers.append(SparseLayer(name, facts[name].shape, backend, reason))
    return SemiStructuredReport(tuple(layers))


def _facts(module: nn.Module, name: str, layer: nn.Linear, dtype: torch.dtype | None) -> SparseWeight:
    parametrized = is_mapped(layer, "weight") or parametrize.is_parametrized(layer, "weight")
    holder = module.get_submodule(name.rpartition(".")[0])
    odd = ""
    if isinstance(holder, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        odd = f"{type(holder).__name__}'s fast path"  # hands the weights of its layers to a kernel of its own
    elif not parametrized and type(layer) is not nn.Linear:
        odd = type(layer).__name__
    (proof,) = prove_nm(layer, {"": PATTERN})
    return SparseWeight(
        shape=(layer.out_features, layer.in_features),
        dtype=dtype or layer.weight.dtype,
        violations=proof.violations,
        layer=odd,
        parametrized=parametrized,
        tied="" if parametrized else next(_other_names(module, layer.weight, name), ""),
    )


def _other_names(module: nn.Module, weight: Tensor, name: str) -> Iterator[str]:
    for other, layer in module.named_modules():
        for key, parameter in layer._parameters.items():
            if parameter is weight and other != name:
                yield f"{other}.{key}" if other else key


@torch.no_grad()
def _pack(layer: nn.Linear, backend: str) -> str:
    """Replace the weight of a layer; return why that failed, the layer being as before then."""
    dense = layer.weight
    inputs = torch.randn(64, layer.in_features, device=dense.device).to(dense.dtype)
    wanted = layer(inputs)
    try:
        layer.weight = nn.Parameter(_packed(dense.detach().contiguous(), backend), requires_grad=False)
        found = layer(inputs)
    except (RuntimeError, NotImplementedError) as error:
        layer.weight = dense
        return f"{backend} refused it: {str(error).splitlines()[0]}"
    off = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp_min(1e-12))
    if not off <= _TOLERANCE[dense.dtype]:
        layer.weight = dense
        return f"{backend} gives other results: they differ by {off:.2g} of the largest"
    return ""


def _packed(weight: Tensor, backend: str) -> Tensor:
    kinds = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    packed: Tensor = kinds[backend].from_dense(weight)
    return packed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
