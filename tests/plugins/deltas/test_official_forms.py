"""Forms beside runs of their official layers on one small weight; what those computed is in tests/fixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from official_values import values_of
from torch import Tensor, nn

import lightning_peft
from lightning_peft.deltas.form import Form
from lightning_peft_plugins.deltas._shared.orthogonality import orthogonality

RECORDED = values_of("deltas_official")
INPUTS, WEIGHT = (torch.tensor(RECORDED[key], dtype=torch.float64) for key in ("inputs", "weight"))
METHODS: dict[str, Any] = {
    "sorsa": lightning_peft.SORSA(2, alpha=3, targets=["layer"], exclude=None),
    "loldu": lightning_peft.LoLDU(3, targets=["layer"], exclude=None),
    "salt": lightning_peft.SALT(2, 0.5, targets=["layer"], exclude=None),
    "lora_xs": lightning_peft.LoRAXS(2, 3, targets=["layer"], exclude=None),
    "flora": lightning_peft.FLoRA(2, 3, targets=["layer"], exclude=None),
}


class Holder(LightningModule):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.double()


def begun(name: str, layer: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """A layer with the recorded weight and a new delta."""
    module = Holder(layer or nn.Linear(6, 4, bias=False))
    if layer is None:
        with torch.no_grad():
            module.layer.weight.copy_(WEIGHT)  # type: ignore[operator, union-attr]
    METHODS[name].attach(module)
    ((_, form),) = METHODS[name].forms(module)
    return module.layer, form


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def put(form: Form, values: dict[str, Any]) -> None:
    own = form.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(tensor(value))


@pytest.mark.parametrize("name", ["sorsa", "loldu", "salt", "lora_xs"])
def test_a_layer_computes_what_the_official_one_does(name: str) -> None:
    layer, form = begun(name)
    recorded = RECORDED[name]
    if "first" in recorded:
        torch.testing.assert_close(layer(INPUTS), tensor(recorded["first"]), atol=1e-5, rtol=1e-5)
    put(form, recorded["form"])
    # SALT's own output passes a rectifier, which stops all gradients but those of the diagonal; ours has none (see its card)
    expected = recorded["output_without_relu" if name == "salt" else "output"]
    output = layer(INPUTS)
    torch.testing.assert_close(output, tensor(expected), atol=1e-5, rtol=1e-5)
    output.square().sum().backward()
    for key in ("values", "gain"):
        if f"grad_{key}" in recorded:
            gradient = getattr(form, key).grad
            torch.testing.assert_close(gradient, tensor(recorded[f"grad_{key}"]).view_as(gradient), atol=1e-3, rtol=1e-4)


def test_the_first_factors_of_lora_xs_are_the_official_ones_but_for_signs() -> None:
    _, form = begun("lora_xs")
    theirs = {key: tensor(value) for key, value in RECORDED["lora_xs"]["form"].items()}
    torch.testing.assert_close(form.up @ form.down, theirs["up"] @ theirs["down"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(form.down.norm(dim=1), theirs["down"].norm(dim=1), atol=1e-5, rtol=1e-5)


def test_the_penalty_of_sorsa_is_the_official_one() -> None:
    _, form = begun("sorsa")
    put(form, RECORDED["sorsa"]["form"])
    penalty = (orthogonality(form.rows()) + orthogonality(form.up.mT)).detach() / 2
    assert float(penalty) == pytest.approx(RECORDED["sorsa"]["penalty"], rel=1e-5)


def test_the_tensors_of_flora_make_the_official_output() -> None:
    recorded = RECORDED["flora"]
    layer, form = begun("flora")
    inner, outer = map(tensor, recorded["sides"])
    put(form, {"core": tensor(recorded["core"]).T.tolist(), "sides.0": outer.tolist(), "sides.1": inner.tolist()})
    torch.testing.assert_close(layer(INPUTS), tensor(recorded["output"]), atol=1e-5, rtol=1e-5)

    recorded = RECORDED["flora_conv"]
    conv = nn.Conv2d(4, 6, 3, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(recorded["kernel"]))
    layer, form = begun("flora", conv)
    inner, outer, *kernel = map(tensor, recorded["sides"])
    sides = {f"sides.{place}": side.tolist() for place, side in enumerate([outer, inner, *kernel])}
    put(form, {"core": tensor(recorded["core"]).transpose(0, 1).tolist(), **sides})
    torch.testing.assert_close(layer(tensor(recorded["images"])), tensor(recorded["output"]), atol=1e-4, rtol=1e-4)
