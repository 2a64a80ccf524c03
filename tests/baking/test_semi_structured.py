"""Which layers can be packed is decided from facts; there is no GPU here, so nothing is said about what packing is worth."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.baking import semi_structured as file
from lightning_peft.baking.semi_structured import MULTIPLES, SparseDevice, SparseWeight, choose_backend, semi_structured
from lightning_peft.weights.nm import nm_mask

AMPERE, HOPPER = SparseDevice("cuda", (8, 0), True), SparseDevice("cuda", (9, 0), True)


def sparse(rows: int = 32, columns: int = 32) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    layer.weight.data *= nm_mask(layer.weight, 2, 4, 1)
    return layer


def test_multiples_are_those_of_pytorch() -> None:
    kinds = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    for backend, kind in kinds.items():
        for dtype in (torch.float16, torch.bfloat16):
            own = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert MULTIPLES[backend] == (own.sparse_min_rows, own.sparse_min_cols)


@pytest.mark.parametrize(
    ("weight", "device", "backend", "reason"),
    [
        (SparseWeight((64, 64), torch.float16), AMPERE, "cusparselt", ""),
        (SparseWeight((64, 64), torch.bfloat16), HOPPER, "cusparselt", ""),
        (SparseWeight((64, 64), torch.float16), SparseDevice("cuda", (8, 6)), "cutlass", ""),
        (SparseWeight((16, 64), torch.float16), SparseDevice("cuda", (8, 6)), "", "not a multiple of 32 x 64"),
        (SparseWeight((16, 16), torch.float16), HOPPER, "cusparselt", ""),
        (SparseWeight((24, 16), torch.float16), HOPPER, "", "not a multiple of 16 x 16"),
        (SparseWeight((64, 64), torch.float16), SparseDevice("cuda", (9, 0)), "", "no cuSPARSELt"),
        (SparseWeight((64, 64), torch.float16), SparseDevice("cuda", (7, 5), True), "", "no sparse tensor cores"),
        (SparseWeight((64, 64), torch.float16), SparseDevice("cpu"), "", "needs an NVIDIA|need an NVIDIA"),
        (SparseWeight((64, 64), torch.float16), SparseDevice("rocm"), "", "rocm"),
        (SparseWeight((64, 64), torch.float32), AMPERE, "", "float32 is not supported: pass dtype="),
        (SparseWeight((64, 64), torch.float16, violations=3), AMPERE, "", "not 2:4: 3 groups"),
        (SparseWeight((64, 64), torch.float16, parametrized=True), AMPERE, "", "bake the module first"),
        (SparseWeight((64, 64), torch.float16, tied="embedding.weight"), AMPERE, "", "tied to embedding.weight"),
        (SparseWeight((64, 64), torch.float16, layer="LoraLinear"), AMPERE, "", "LoraLinear"),
    ],
)
def test_the_decision(weight: SparseWeight, device: SparseDevice, backend: str, reason: str) -> None:
    import re

    chosen, why = choose_backend(weight, device)
    assert chosen == backend
    assert re.search(reason, why)
    assert bool(why) == (not backend)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.head = nn.Embedding(32, 32), sparse(), nn.Linear(32, 32, bias=False)
        self.odd = torch.nn.modules.linear.NonDynamicallyQuantizableLinear(32, 32)
        self.head.weight = self.embedding.weight


def reasons(module: nn.Module, **settings: object) -> dict[str, str]:
    return {layer.name: layer.reason for layer in semi_structured(module, **settings).layers}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge layers as if they lay on a GPU; what packs them is set by each test."""
    monkeypatch.setattr(SparseDevice, "of", classmethod(lambda cls, device: HOPPER))


def test_on_the_cpu_nothing_changes_and_nothing_raises() -> None:
    module = Tied()
    before = {name: (tensor.clone(), tensor.dtype) for name, tensor in module.state_dict().items()}
    report = semi_structured(module, torch.float16)
    assert not report.converted
    assert all("on cpu" in layer.reason for layer in report.dense)
    assert all(torch.equal(before[name][0], tensor) for name, tensor in module.state_dict().items())
    assert all(before[name][1] == tensor.dtype for name, tensor in module.state_dict().items())
    assert "0 of 3 linear layers" in str(report)
    assert len(report.layers) == 3
    with pytest.raises(MisconfigurationException, match="nothing"):
        semi_structured(module, targets=["nothing"])


def test_every_layer_that_stays_dense_says_why(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_packed", lambda weight, backend: weight.clone())
    module = nn.ModuleDict({"tied": Tied(), "dense": nn.Linear(32, 32), "block": nn.TransformerEncoderLayer(32, 2, 64)})
    found = reasons(module)
    assert "float32 is not supported" in found["tied.fc"]
    found = reasons(module, dtype=torch.bfloat16, exclude=["block.linear2"])
    assert found["tied.fc"] == ""
    assert module["dense"].weight.dtype == torch.bfloat16  # the whole module, so that layers fit each other
    assert found["tied.head"] == "tied to tied.embedding.weight, which would no longer be the same parameter"
    assert "NonDynamicallyQuantizableLinear" in found["tied.odd"]
    assert "not 2:4" in found["dense"]
    assert "TransformerEncoderLayer's fast path" in found["block.linear1"]
    assert "MultiheadAttention's fast path" in found["block.self_attn.out_proj"]
    assert "block.linear2" not in found
    assert not module["tied"].fc.weight.requires_grad


def test_a_layer_under_a_parametrization_is_left_alone(gpu: None) -> None:
    layer = nn.Sequential(nn.utils.parametrizations.weight_norm(sparse()))
    assert reasons(layer, dtype=torch.float16) == {"0": "a parametrization stands on the weight: bake the module first"}


def refuse(weight: torch.Tensor, backend: str) -> torch.Tensor:
    raise RuntimeError("CUDA error: not supported\nmore")


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (refuse, "cusparselt refused it: CUDA error: not supported"),
        (lambda weight, backend: weight.roll(1, 1), "cusparselt gives other results"),
        (lambda weight, backend: weight * float("nan"), "cusparselt gives other results"),
    ],
)
def test_a_layer_whose_kernel_fails_or_is_wrong_is_dense_again(gpu: None, monkeypatch, packed, reason: str) -> None:
    monkeypatch.setattr(file, "_packed", packed)
    module = nn.Sequential(sparse()).to(torch.float16)
    weight = module[0].weight
    values = weight.detach().clone()
    assert reason in reasons(module)["0"]
    assert module[0].weight is weight
    assert torch.equal(weight, values)
    assert weight.requires_grad


def test_pytorchs_own_packing_keeps_a_24_weight(gpu: None) -> None:
    """The arithmetic of PyTorch's CUTLASS format, which runs on the CPU, gives our masks back."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    weight = sparse(64, 64).weight.detach().half()
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight)), weight)


@pytest.mark.parametrize("backend", ["cusparselt", "cutlass"])
def test_pytorchs_own_refusal_becomes_the_reason(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = AMPERE if backend == "cusparselt" else SparseDevice("cuda", (8, 0))
    monkeypatch.setattr(SparseDevice, "of", classmethod(lambda cls, _: device))
    module = nn.Sequential(sparse(64, 64)).to(torch.float16)
    weight = module[0].weight
    assert f"{backend} refused it: Error original_tensor.device= cpu" in reasons(module)["0"]
    assert module[0].weight is weight


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
def test_packed_layers_are_not_measured_or_saved(tmp_path) -> None:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    from lightning_peft import save_baked
    from lightning_peft.measure.deployment import measure

    layer = sparse(64, 64).half()
    packed, meta = sparse_semi_structured_from_dense_cutlass(layer.weight.detach())
    shape = layer.weight.shape
    tensor = torch.sparse.SparseSemiStructuredTensorCUTLASS(shape, packed, meta, None, None, None)
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(MisconfigurationException, match="Measure it before packing"):
        measure(nn.Sequential(layer), torch.randn(2, 64).half())
    with pytest.raises(MisconfigurationException, match=r"Save before packing \(semi_structured\)"):
        save_baked(nn.Sequential(layer), tmp_path / "net")
    assert not list(tmp_path.iterdir())
