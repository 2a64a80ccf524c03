"""What every delta owes: it begins as nothing, counts what it trains, and is the same on both sides of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lightning_peft
from lightning_peft.deltas.delta_part import DeltaPart
from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.form import build_form, described
from lightning_peft.weights.parts import placed_parts

METHODS: dict[str, Callable[..., Any]] = {
    "LoRA": lambda **k: lightning_peft.LoRA(2, 3, **k),
    "DoRA": lambda **k: lightning_peft.DoRA(2, 3, **k),
    "AdaLoRA": lambda **k: lightning_peft.AdaLoRA(2, 1, 3, **k),
    "DyLoRA": lambda **k: lightning_peft.DyLoRA(3, alpha=3, at=2, **k),
    "IncreLoRA": lambda **k: lightning_peft.IncreLoRA(1, 2, 3, **k),
    "TriAdaptLoRA": lambda **k: lightning_peft.TriAdaptLoRA(1, 2, 3, **k),
    "PiSSA": lambda **k: lightning_peft.PiSSA(2, 3, **k),
    "OLoRA": lambda **k: lightning_peft.OLoRA(2, 3, **k),
    "SORSA": lambda **k: lightning_peft.SORSA(2, alpha=3, **k),
    "KaSA": lambda **k: lightning_peft.KaSA(2, 3, **k),
    "SVFit": lambda **k: lightning_peft.SVFit(3, **k),
    "LoLDU": lambda **k: lightning_peft.LoLDU(3, **k),
    "LoRAXS": lambda **k: lightning_peft.LoRAXS(2, 3, **k),
    "MiSS": lambda **k: lightning_peft.MiSS(3, **k),
    "Bone": lambda **k: lightning_peft.Bone(2, **k),
    "FLoRA": lambda **k: lightning_peft.FLoRA(2, 3, **k),
    "SALT": lambda **k: lightning_peft.SALT(2, 0.5, **k),
    "PHM": lambda **k: lightning_peft.PHM(2, 2, **k),
    "NOLA": lambda **k: lightning_peft.NOLA(2, 3, bases=5, **k),
    "RandLoRA": lambda **k: lightning_peft.RandLoRA(3, 4, **k),
    "SoKA": lambda **k: lightning_peft.SoKA(2, **k),
    "PEGO": lambda **k: lightning_peft.PEGO(1, 3, **k),
    "LoRAGGPO": lambda **k: lightning_peft.LoRAGGPO(2, 3, **k),
    "ALLoRA": lambda **k: lightning_peft.ALLoRA(2, **k),
    "TLoRA": lambda **k: lightning_peft.TLoRA(2, 3, 2, **k),
    "DSEE": lambda **k: lightning_peft.DSEE(2, 3, 5, **k),
}
# By hand, for a weight of 4 x 6 (outputs, inputs): the formulas of the papers with the numbers above.
TRAINABLE = {
    "LoRA": 2 * (4 + 6),
    "DoRA": 2 * (4 + 6) + 4,
    "AdaLoRA": 2 * (4 + 6) + 2,
    "DyLoRA": 3 * (4 + 6),
    "IncreLoRA": (4 + 1) * (4 + 6 + 1),  # room for the rank of four, and one in reserve
    "TriAdaptLoRA": 4 * (4 + 6) + 2 * (1 + 2 + 3 + 4),  # room for the rank of four
    "PiSSA": 2 * (4 + 6),
    "OLoRA": 2 * (4 + 6),
    "SORSA": 2 * (4 + 6) + 2,
    "KaSA": 2 * (4 + 6) + 2,
    "SVFit": 3,
    "LoLDU": 3 + 1,
    "LoRAXS": 2 * 2,
    "MiSS": 3 * 4,
    "Bone": 4 // 2 * 2 * 2,
    "FLoRA": 2 * 2 + 2 * 4 + 2 * 6,
    "SALT": 2 * 2 + 2 * 2 * 2,
    "PHM": 2**3 + 2 * (4 + 6),
    "NOLA": 5 + 5,
    "RandLoRA": 2 * (3 + 4),
    "SoKA": 2 * (2 * 2 + 2 * 3),
    "PEGO": 3 * (4 + 6),
    "LoRAGGPO": 2 * (4 + 6),
    "ALLoRA": 2 * (4 + 6),
    "TLoRA": 3**2 * (2 * 2 + 3 * 3) + 2**2 * (2 + 2 + 2 + 3),  # 4 = 2 x 2, 6 = 2 x 3
    "DSEE": 2 * (4 + 6) + 5,
}
IMAGES, ROWS = (torch.randn(size, generator=torch.Generator().manual_seed(0)).double() for size in ((2, 4, 5, 5), (3, 5, 6)))
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 4), ROWS),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, 2, 1), IMAGES),
    "transposed": (lambda: transformers.pytorch_utils.Conv1D(4, 6), ROWS),
    "table": (lambda: nn.Embedding(8, 6), torch.arange(8).view(2, 4)),
}


class Holder(LightningModule):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def attached(name: str, kind: str) -> tuple[nn.Module, Any, Tensor, Tensor]:
    """A layer with a delta on it, its form, inputs, and what it returned before."""
    torch.manual_seed(0)
    make, inputs = LAYERS[kind]
    layer = make().double()
    before = layer(inputs)
    module = Holder(layer)
    method = METHODS[name](targets=["layer"], exclude=None)
    method.attach(module)
    ((_, form),) = method.forms(module)
    return layer, form, inputs, before


def pairs() -> list[tuple[str, str]]:
    return [(name, kind) for name in METHODS for kind in LAYERS if (name, kind) != ("DoRA", "table")]


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_a_delta_begins_as_nothing_and_is_the_same_on_both_sides(name: str, kind: str) -> None:
    layer, form, inputs, before = attached(name, kind)
    if name == "KaSA":  # gives two singular values away
        assert (layer(inputs) - before).abs().max() > 1e-3
    else:
        atol = 1e-3 if name == "LoRAXS" else 1e-10  # whose core begins near zero
        torch.testing.assert_close(layer(inputs), before, atol=atol, rtol=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 3)
    live = layer(inputs)
    assert (live - before).abs().max() > 1e-2
    lightning_peft.bake(layer)
    torch.testing.assert_close(layer(inputs), live, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_a_delta_counts_its_parameters(name: str) -> None:
    _, form, _, _ = attached(name, "linear")
    assert sum(parameter.numel() for parameter in form.parameters()) == TRAINABLE[name]


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_the_closed_formula_counts_what_there_is(name: str, kind: str) -> None:
    _, form, _, _ = attached(name, kind)
    have = sum(parameter.numel() for parameter in form.parameters())
    assert type(form).trainable(form.layout, **form.config()) == have


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_a_form_is_made_again_from_what_a_file_says(name: str, kind: str) -> None:
    _, form, _, _ = attached(name, kind)
    again = build_form(**described(form)).double()
    again.load_state_dict(form.state_dict())
    weight = torch.randn(form.layout.shape, dtype=torch.float64)
    torch.testing.assert_close(again.on_weight(weight), form.on_weight(weight))


def test_stacks_of_matrices_have_a_delta_each() -> None:
    for name in METHODS:
        torch.manual_seed(0)
        module = Holder(nn.Module())
        module.layer.weights = nn.Parameter(torch.randn(3, 4, 6, dtype=torch.float64))  # type: ignore[assignment]
        first = module.layer.weights.detach().clone()  # type: ignore[operator]
        method = METHODS[name](targets=["layer"], exclude=None)
        method.attach(module)
        ((_, form),) = method.forms(module)
        with torch.no_grad():
            for parameter in form.parameters():
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype) / 3)
        whole, config = module.layer.weights.detach(), form.config()  # type: ignore[operator]
        if name not in ("NOLA", "DSEE"):  # whose coefficients, or whose places, are those of all matrices
            alone = type(form)(type(form.layout)(torch.Size([4, 6])), **config).double()
            state = {key: value if key.endswith("_extra_state") else value[1] for key, value in form.state_dict().items()}
            alone.load_state_dict(state, strict=True)
            torch.testing.assert_close(whole[1], alone.on_weight(first[1]), msg=name)


def test_only_thin_products_stand_beside_a_layer() -> None:
    for name in METHODS:
        layer, form, _, _ = attached(name, "linear")
        beside = any(isinstance(placed.part, DeltaPart) for placed in placed_parts(layer))
        assert beside == isinstance(form, FactoredForm) == (name not in ("Bone", "SoKA", "TLoRA", "DSEE")), name


@pytest.mark.parametrize("kind", ["bases", "low_rank"])
def test_a_file_asks_for_more_memory_than_a_weight_could_use(kind: str) -> None:
    hostile = {"rank": 1, "bases": 10**12} if kind == "bases" else {"rank": 1, "taken": 10**9}
    with pytest.raises(ValueError, match=r"bases|numbers"):
        build_form(kind, [4, 6], False, False, hostile)
