"""Methods on networks that carry adapters of PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import MagnitudePruning, NMSparsity, WeightCompander, plan
from lightning_peft.functional import is_nm
from lightning_peft.network.targets import select
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit

peft = pytest.importorskip("peft")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


class Adapted(Plain):
    """A low-rank adapter on the second layer, everything else trains too where asked."""

    whole = False
    use_dora = False

    def build(self) -> None:
        self.model = peft.get_peft_model(network(), peft.LoraConfig(r=4, target_modules=["2"], use_dora=self.use_dora))
        if self.whole:
            self.model.requires_grad_(True)

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Whole(Adapted):
    whole = True


class Dora(Adapted):
    use_dora = True


@pytest.mark.parametrize("style", [Adapted, Dora])
def test_presets_and_classes_select_no_part_of_an_adapter(style: type[Adapted]) -> None:
    module = style()
    for targets in ("all-linear", "all-weights", nn.Linear, "type:Linear"):
        assert not [name for name in select(module, targets) if "lora" in name], targets
    assert len(select(module, "lora_A.default")) == 1


@pytest.mark.parametrize("method", [NMSparsity, MagnitudePruning, WeightCompander])
def test_a_network_whose_base_is_frozen_has_nothing_to_change(method: Any) -> None:
    with pytest.raises(MisconfigurationException, match="leaves frozen weights alone"):
        plan(Adapted(), [method()])


@pytest.mark.parametrize("method", [NMSparsity, MagnitudePruning])
def test_a_weight_beside_an_adapter_is_not_masked_and_the_advice_works(method: Any) -> None:
    refusal = r"would mask model\.base_model\.model\.2\.base_layer, beside which stands an adapter.*merge_and_unload"
    with pytest.raises(MisconfigurationException, match=refusal):
        plan(Whole(), [method(exclude=())])
    with pytest.raises(MisconfigurationException, match=refusal):
        plan(Adapted(), [method(targets=["2.base_layer"], exclude=())])
    fit([method(exclude=["2.base_layer", "head"])], module=Whole())
    module = fit([], module=Adapted()).module
    module.model = module.model.merge_and_unload()
    module.requires_grad_(True)
    fit([NMSparsity("2:4", recipe="one-shot", exclude=())], module=module)
    assert all(is_nm(layer.weight, 2, 4) for layer in module.model if isinstance(layer, nn.Linear))
