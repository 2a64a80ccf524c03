from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.network.logits import as_logits
from lightning_peft.network.resolve import resolve_network
from lightning_peft.testing.modules import STYLES, ModelOutput, Plain
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyScale


class Holder(LightningModule):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Forwarding(Holder):
    def forward(self, x):
        return self.a(x)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_every_style_has_a_network(style):
    module = style()
    module.configure_model()
    name, network = resolve_network(module)
    assert name == ("" if style.__name__ in ("Root", "TwoOptimizers") else "model")
    assert network is module.get_submodule(name)


def test_metrics_losses_and_a_tiny_head_do_not_count():
    module = Holder(net=nn.Linear(100, 100), metric=MulticlassAccuracy(3), loss=nn.CrossEntropyLoss(), scale=nn.Linear(1, 1))
    assert resolve_network(module)[0] == "net"


def test_a_name_wins():
    module = Holder(a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    assert resolve_network(module, "b") == ("b", module.b)
    assert resolve_network(module, "") == ("", module)


def test_a_network_that_is_compiled_before_it_is_held_is_the_network():
    module = Holder(net=torch.compile(nn.Linear(2, 2), backend="eager"))
    assert resolve_network(module) == ("net", module.net)


def test_an_unknown_name_lists_the_children():
    with pytest.raises(MisconfigurationException, match=r"network='c' is not a submodule of Holder; its children are 'a', 'b'"):
        resolve_network(Holder(a=nn.Linear(2, 2), b=nn.Linear(2, 2)), "c")


def test_several_children_need_a_forward_or_a_name():
    with pytest.raises(MisconfigurationException, match=r"'a' \(50 % of the parameters\), 'b' \(50 %"):
        resolve_network(Holder(a=nn.Linear(2, 2), b=nn.Linear(2, 2)))
    module = Forwarding(a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    assert resolve_network(module) == ("", module)


def test_a_list_of_blocks_answers_nothing_so_it_is_not_the_network():
    """Forecasting libraries hold all their layers in one list, which the module's own forward walks through."""
    module = Forwarding(blocks=nn.ModuleList(nn.Linear(2, 2) for _ in range(3)))
    assert resolve_network(module) == ("", module)
    with pytest.raises(MisconfigurationException, match=r"'blocks' \(100 % of the parameters\)"):
        resolve_network(Holder(blocks=nn.ModuleList(nn.Linear(2, 2) for _ in range(3))))


def test_a_module_without_parameters_says_so():
    with pytest.raises(MisconfigurationException, match="no child has parameters"):
        resolve_network(Holder(act=nn.ReLU()))


@dataclass
class Output:
    logits: torch.Tensor


LOGITS = torch.ones(2, 3)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        {"logits": LOGITS},
        ModelOutput(logits=LOGITS),
        Output(LOGITS),
        (LOGITS, 1),
        [None, LOGITS],
        ("x", LOGITS, LOGITS + 1),
    ],
    ids=["tensor", "dict", "hf", "attribute", "tuple", "list", "first-tensor"],
)
def test_logits_are_found(output):
    assert as_logits(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "shown"), [({"loss": LOGITS}, r"dict with keys \['loss'\]"), (3, "int"), ((), "tuple"), (None, "NoneType")]
)
def test_outputs_without_logits_are_described(output, shown):
    with pytest.raises(MisconfigurationException, match=f"returned {shown}.*no logits were found"):
        as_logits(output)


class Late(Plain):
    """Its second layer is as large as the first batch makes it."""

    def build(self) -> None:
        super().build()
        self.model[2] = nn.LazyLinear(16)


def test_a_lazy_layer_is_refused_until_a_batch_has_been_through_it():
    module = Late()
    with pytest.raises(MisconfigurationException, match=r"model\.2 is a LazyLinear, whose weight has no shape.*no_grad"):
        fit([ToyScale()], module=module)
    with torch.no_grad():
        module.model(torch.zeros(1, 16))
    run = fit([ToyScale()], module=module)
    assert run.module.model[2].weight.shape == (16, 16)
