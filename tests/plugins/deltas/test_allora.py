"""ALLoRA: gradients of rows by hand, on both sides of a layer, and a network that computes what LoRA's does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lora_by_hand import answers, thin, train
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import ALLoRA
from lightning_peft.deltas.delta_map import DeltaMap
from lightning_peft.deltas.layout import Layout
from lightning_peft.functional import row_rates
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.weights.maps import attach_map
from lightning_peft.weights.parts import put_part
from lightning_peft_plugins.deltas.allora import RatedForm, RatedPart

WHOLE: dict[str, Any] = {"exclude": None, "checkpoint": "full"}


def by_the_paper(task: Task) -> list[float]:
    """Gradients are those of the whole product, whose rows are multiplied, and only then go to the factors."""
    layers = thin(task, "al_lora", 2)

    def step(number: int, inputs: Tensor, labels: Tensor) -> Tensor:
        products = [each.product.detach().requires_grad_() for each in layers]
        weights = [each.layer.weight + product for each, product in zip(layers, products, strict=True)]
        loss = F.cross_entropy(answers(inputs, layers, weights), labels)
        for each, product, gradient in zip(layers, products, torch.autograd.grad(loss, products), strict=True):
            rows = [row / (length + 1 / 3**2) ** 0.5 for row, length in zip(gradient, product.norm(dim=1), strict=True)]
            gradient = torch.stack(rows).detach()
            each.up.grad, each.down.grad = gradient @ each.down.detach().T, each.up.detach().T @ gradient
        return loss

    return train(task, layers, step)


class TestALLoRA(MethodTester):
    methods = [
        lambda: ALLoRA(2, 3.0, **WHOLE),
        lambda: ALLoRA(2, targets="all-weights", tune=("bias",), **WHOLE),
    ]
    references = [Reference(by_the_paper)]


def test_rates_by_hand() -> None:
    down, up = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0], [3.75], [-15.75]])
    assert row_rates(down, up, 2.0).tolist() == pytest.approx([2, 0.5, 0.25])  # the roots of 1/4, 4 and 16


def drawn(shape: list[int]) -> RatedForm:
    form = RatedForm(Layout(torch.Size(shape)), 2, eta=0.5).double()
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return form


def test_both_sides_have_the_same_gradients_and_inputs_have_those_of_lora() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 6, dtype=torch.float64)
    found = []
    for side in ("beside", "weight", "plain"):
        torch.manual_seed(1)
        layer: Any = nn.Linear(6, 4).double()
        form, read = drawn([4, 6]), inputs.clone().requires_grad_()
        if side == "beside":
            put_part(layer, "", RatedPart(form))
        elif side == "weight":
            attach_map(layer, "weight", DeltaMap(form))
        output = F.linear(read, layer.weight + form.up @ form.down, layer.bias) if side == "plain" else layer(read)
        output.square().sum().backward()
        found.append((output.detach(), read.grad, form.down.grad, form.up.grad))
    beside, weight, plain = found
    torch.testing.assert_close(beside, weight)
    torch.testing.assert_close(beside[:2], plain[:2])
    assert not torch.allclose(beside[2], plain[2])  # type: ignore[arg-type]


def test_what_it_does_without_is_no_argument() -> None:
    for name in ("alpha", "dropout"):
        with pytest.raises(TypeError, match=name):
            ALLoRA(**{name: 0.5})
    with pytest.raises(MisconfigurationException, match="must be positive"):
        ALLoRA(eta=0.0)
