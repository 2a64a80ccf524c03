"""The exported network computes what the eager one does, and whoever does not is found out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from export_toys import network_of, trained
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_peft import NMSparsity
from lightning_peft.baking import portable
from lightning_peft.baking.agreement import ExportError, largest_difference, other_inputs, tensors_of
from lightning_peft.baking.plain_network import batch_size, call, plain_network, with_batch_size
from lightning_peft.baking.portable import to_exported, to_onnx
from lightning_peft.testing.modules import ModelOutput as HuggingFaceOutput
from lightning_peft.testing.modules import Plain, loader
from lightning_peft.testing.runs import fit
from lightning_peft.testing.trace import difference, trace

KINDS = ["conv", "grown", "vision", "text", "tied"]
onnxruntime = pytest.importorskip("onnxruntime")


def eager(module, inputs) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(call(copy.deepcopy(network_of(module)).eval(), inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_exported_and_onnx_are_the_baked_network_at_any_batch_size(kind: str, tmp_path) -> None:
    module, inputs = trained(kind)
    before = trace(module)
    path = to_onnx(module, tmp_path / "deep" / "net.onnx", inputs)
    torch.export.save(to_exported(module, inputs), tmp_path / "net.pt2")
    assert difference(before, trace(module)) is None
    run, program = portable._runtime(path), torch.export.load(tmp_path / "net.pt2").module()
    for size in (1, 7):
        example = with_batch_size(inputs, size)
        wanted = eager(module, example)
        for found in (run(example), tensors_of(call(program, example))):
            assert len(found) == len(wanted)
            for one, other in zip(wanted, found, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["net.onnx"]


def test_the_weights_in_the_file_are_24(tmp_path) -> None:
    import onnx

    module, inputs = trained("conv")
    model = onnx.load(to_onnx(module, tmp_path / "net.onnx", inputs))
    arrays = [onnx.numpy_helper.to_array(item) for item in model.graph.initializer]
    (linear,) = [array for array in arrays if array.shape in ((16, 128), (128, 16))]
    rows = linear if linear.shape == (16, 128) else linear.T
    assert ((rows.reshape(16, 32, 4) != 0).sum(-1) == 2).all()


def test_a_module_in_training_is_baked_in_the_copy_only() -> None:
    programs = {}

    class During(Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            if trainer.global_step == 6:
                program = to_exported(module, torch.randn(4, 16))
                programs["weight"] = program.state_dict["0.weight"].clone()
                programs["training"] = module.training
                programs["mapped"] = hasattr(module.model[0], "parametrizations")

    fit([NMSparsity("2:4", targets=["model.0"], exclude=())], after=[During()], max_epochs=2)
    assert (programs["weight"].unflatten(-1, (-1, 4)).count_nonzero(-1) == 2).all()
    assert programs["training"]
    assert programs["mapped"]


def test_one_batch_size_only(tmp_path) -> None:
    module, inputs = trained("conv")
    fixed = to_exported(module, inputs, dynamic_batch=False).module()
    assert fixed(inputs).shape == (5, 3)
    with pytest.raises(Exception, match=r"16|5|Guard|guard"):
        fixed(torch.randn(9, 16))


def test_rows_that_a_mask_leaves_empty_are_not_made_up(tmp_path) -> None:
    """The softmax over nothing is not defined, and runtimes differ there; a mask must stay that of its sentence."""
    ids, mask = torch.arange(6).reshape(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    other = other_inputs({"ids": ids, "mask": mask}, larger=True)
    assert other["ids"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert other["mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]


def test_recurrent_layers_are_exported(tmp_path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.lstm(inputs)[0][:, -1])

    network, inputs = Recurrent().eval(), torch.randn(2, 5, 4)
    found = to_exported(network, inputs).module()(torch.ones(3, 5, 4))
    torch.testing.assert_close(found, network(torch.ones(3, 5, 4)).detach())


class Reshapes(nn.Module):
    """Made for four samples."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(4, 2, 8).sum(1)


class Draws(nn.Module):
    """Draws random numbers in evaluation mode."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.rand_like(inputs)


class Remembers(nn.Module):
    """Has a constant of its first call where the graph can not see that it is one."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not hasattr(self, "seen"):
            object.__setattr__(self, "seen", 0)
        object.__setattr__(self, "seen", self.seen + 1)
        return inputs * self.seen


class Hides(nn.Module):
    """Gives back an object that nobody knows how to look into."""

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(inputs=inputs)


@dataclass
class Output:
    logits: Tensor
    more: tuple[Tensor | None, ...]


class Named(NamedTuple):
    logits: Tensor
    more: dict[str, Tensor]


@pytest.mark.parametrize(
    ("pack", "kinds"),
    [
        (lambda x: Output(x, (x, None)), [dict, tuple]),
        (lambda x: Named(x, {"again": x}), [tuple, dict]),
        (lambda x: HuggingFaceOutput(logits=x, more=[x]), [dict, list]),
    ],
)
def test_an_exported_network_gives_back_containers_that_every_process_knows(pack, kinds) -> None:
    class Packs(nn.Module):
        def forward(self, inputs: Tensor) -> Any:
            return pack(inputs + 1)

    program = to_exported(Packs(), torch.randn(4, 16))
    found, seen = program.call_spec.out_spec, []
    while found is not None:
        seen += [found.type] if found.type is not None else []
        found = next((child for child in found.children() if not child.is_leaf()), None)
    assert seen == kinds
    assert len(tensors_of(program.module()(torch.zeros(2, 16)))) == 2


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Reshapes(), "dynamic_batch=False"),
        (Draws(), r"differs by up to 0\.\d+ \(batch size 4"),
        (Remembers(), "differs by up to"),
        (Hides(), "register_pytree_node"),
    ],
)
@pytest.mark.parametrize("form", ["exported", "onnx"])
def test_what_cannot_be_exported_faithfully_is_refused(network: nn.Module, reason: str, form: str, tmp_path) -> None:
    inputs = torch.randn(4, 16)
    with pytest.raises(ExportError, match=reason):
        to_exported(network, inputs) if form == "exported" else to_onnx(network, tmp_path / "net.onnx", inputs)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_file_of_before(tmp_path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(ExportError):
        to_onnx(Draws(), path, torch.randn(4, 16))
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("net.onnx", b"mine")]


def test_bad_input_names_the_fix(tmp_path, monkeypatch) -> None:
    with pytest.raises(MisconfigurationException, match="no tensor with a batch"):
        to_exported(Plain(), {"size": 3})
    with pytest.raises(MisconfigurationException, match=r"module\.float\(\)"):
        to_onnx(Plain().bfloat16(), tmp_path / "net.onnx", torch.randn(2, 16))
    monkeypatch.setattr(portable, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r'pip install "lightning-peft\[export\]"'):
        to_onnx(Plain(), tmp_path / "net.onnx", torch.randn(2, 16))


def test_a_plain_network_is_no_part_of_the_module() -> None:
    module = fit([], data=loader()).module
    plain = plain_network(module)
    assert type(plain) is nn.Sequential
    assert not plain.training
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


@given(st.integers(1, 9), st.integers(1, 9))
def test_other_inputs_have_the_size_asked_for_and_the_same_values(size: int, wanted: int) -> None:
    inputs = {"ids": torch.arange(3 * size).reshape(size, 3), "scale": torch.ones(11), "flag": True}
    more = with_batch_size(inputs, wanted)
    assert batch_size(more) == wanted
    assert more["flag"] is True
    assert (len(more["scale"]) == 11) == (size != 11)
    assert torch.equal(more["ids"], inputs["ids"][[place % size for place in range(wanted)]])
    other = other_inputs(inputs, larger=True)
    assert batch_size(other) == size + 1
    assert set(other["ids"].flatten().tolist()) == set(inputs["ids"].flatten().tolist())
    assert torch.equal(other["scale"], inputs["scale"])


@pytest.mark.parametrize(
    ("wanted", "found", "difference"),
    [
        ([float("nan"), 1.0], [float("nan"), 1.0], 0.0),
        ([float("inf"), 1.0], [float("-inf"), 1.0], float("inf")),
        ([0.5, 1.0], [float("nan"), 1.0], float("inf")),
        ([0.5], [0.5, 0.5], float("inf")),
        ([100.0, 0.0], [100.0, 1.0], 0.01),
        ([], [], 0.0),
    ],
)
def test_differences_are_relative_and_values_that_are_not_finite_must_agree(wanted, found, difference) -> None:
    assert largest_difference(torch.tensor(wanted), torch.tensor(found)) == pytest.approx(difference)
