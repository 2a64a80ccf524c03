"""Networks that hold results of their last call are copied, by every method that copies one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft
from lightning_peft import PSKD, LayerGrowth, Method, StructuredPruning
from lightning_peft.network.deep_copy import deep_copy
from lightning_peft.structure.journal import journal_of
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit


class Remembering(nn.Module):
    """Keeps a state between calls, as recurrent blocks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, 16)
        self.state: Any = None

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.fc1(inputs).relu()
        self.state = {"last": [hidden, (hidden * 2,)]}
        output: Tensor = inputs + self.fc2(hidden)
        return output


class Recurrent(Plain):
    def build(self) -> None:
        self.model = nn.Sequential(Remembering(), Remembering(), nn.Linear(16, 3))


def test_results_leave_their_graph_and_everything_else_is_copied() -> None:
    block = Remembering()
    block(torch.ones(2, 16))
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(block)
    twin = deep_copy(block)
    first, (second,) = twin.state["last"]
    assert torch.equal(first, block.state["last"][0])
    assert not any(result.requires_grad for result in (first, second))
    assert twin.fc1.weight.requires_grad
    assert twin.fc1.weight is not block.fc1.weight
    assert block.state["last"][0].requires_grad, "the network itself is left alone"


@pytest.mark.parametrize(
    "method",
    [
        lambda: StructuredPruning(0.3, start=2, targets=["model.0.fc1", "model.1.fc1"]),
        lambda: LayerGrowth("stack", at=2, blocks="model", sources=[0, 1, 1, 2]),
        lambda: PSKD(teacher="copy"),
    ],
    ids=["cut", "grown", "teacher"],
)
def test_methods_copy_a_network_in_the_middle_of_a_training(method: Any) -> None:
    made: Method = method()
    run = fit([made], style=Recurrent, max_epochs=2)
    assert isinstance(made, PSKD) or journal_of(run.module)
    assert lightning_peft.bake(deep_copy(run.module)).state_dict().keys() == run.module.state_dict().keys()
