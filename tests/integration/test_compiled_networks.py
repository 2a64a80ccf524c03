"""A network that its author compiles whole: no method breaks the graph, or has it compiled anew as steps go by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import (
    PSKD,
    AdaLoRA,
    BALoRA,
    BlockPruning,
    DoRA,
    DyLoRA,
    IncreLoRA,
    LayerGrowth,
    LoRA,
    LoRASB,
    MagnitudePruning,
    MixtureGrowth,
    NMSparsity,
    Wanda,
    WeightCompander,
)
from lightning_peft.method import Method
from lightning_peft.testing.modules import Plain, deepened, loader, trainer

EVERYWHERE: dict[str, Any] = {"targets": "all-linear", "exclude": ()}
ONE: dict[str, Any] = {"targets": ["model.2"], "exclude": ()}
ONCE, FROM_2 = [0], [0, 2]

METHODS: dict[str, tuple[Callable[[], Method], list[int]]] = {  # with the steps before which a network is compiled for training
    "LoRA": (lambda: LoRA(rank=2, **ONE), ONCE),
    "DoRA": (lambda: DoRA(rank=2, **ONE), ONCE),
    "AdaLoRA": (lambda: AdaLoRA(rank=2, target=1, **ONE), ONCE),
    "BALoRA": (lambda: BALoRA(rank=2, **ONE), [0, 0]),  # it asks the network without adapters too
    "DyLoRA": (lambda: DyLoRA(rank=3, **ONE), ONCE),
    "LoRASB": (lambda: LoRASB(rank=2, looks=2, **ONE), FROM_2),
    "IncreLoRA": (lambda: IncreLoRA(target=2, top=8, warmup=0, every=2, **ONE), [0, 1, 3]),
    "NMSparsity": (lambda: NMSparsity("2:4", dense=1, **EVERYWHERE), FROM_2),
    "NMSparsity, SR-STE": (lambda: NMSparsity("2:4", recipe="sr-ste", **EVERYWHERE), ONCE),
    "MagnitudePruning": (lambda: MagnitudePruning(0.5, start=2, end=4, **EVERYWHERE), FROM_2),
    "Wanda": (lambda: Wanda(0.5, start=2, **EVERYWHERE), FROM_2),
    "WeightCompander": (WeightCompander, ONCE),
    "PSKD": (PSKD, ONCE),
    "MixtureGrowth": (lambda: MixtureGrowth(at="step:2"), FROM_2),
    "BlockPruning": (lambda: BlockPruning(1, start=2), FROM_2),
    "LayerGrowth": (lambda: LayerGrowth(operator="zero", at="step:2", start=2), FROM_2),
}
DEPTH = {"BlockPruning", "LayerGrowth"}
ROUNDED = {"DyLoRA", "NMSparsity"}
"""Methods that do the same with other operations in compiled code."""


class Counter:
    """A backend that runs what it is given, and notes the step before which it was asked to."""

    def __init__(self, module: Plain) -> None:
        self.module = module
        self.steps: dict[bool, list[int]] = {True: [], False: []}

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.steps[self.module.trainer.training].append(self.module.trainer.global_step)
        return graph.forward


class Deep(nn.Sequential):
    """A list of equal blocks and what classifies behind it, in one network."""

    def __init__(self) -> None:
        whole = deepened(Plain)()
        super().__init__(whole.blocks, whole.model)


def trained(name: str, compiled: bool, **settings: Any) -> tuple[Plain, dict[bool, list[int]]]:
    torch.manual_seed(0)
    module = Plain("sgd")
    if name in DEPTH:
        module.model = Deep()
    counter = Counter(module)
    if compiled:
        module.model.compile(backend=counter, fullgraph=True)
    trainer(callbacks=[METHODS[name][0]()], **settings).fit(module, loader(), loader(8))
    torch._dynamo.reset()
    return module, counter.steps


@pytest.mark.parametrize("name", METHODS)
def test_a_network_is_compiled_once_for_each_phase(name: str) -> None:
    compiled, steps = trained(name, True)
    assert steps == {True: METHODS[name][1], False: [4]}
    tolerance = 1e-6 if name in ROUNDED else 0.0
    for key, value in trained(name, False)[0].state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, rtol=tolerance, atol=tolerance)


class Silent(Plain):
    """Has no ``forward`` of its own; its network is what ``torch.compile`` returns."""

    forward = LightningModule.forward

    def build(self) -> None:
        super().build()
        self.model = torch.compile(self.model, backend="eager", fullgraph=True)

    def logits(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


def test_what_torch_compile_returns_is_trained_as_the_network_in_it() -> None:
    weights = []
    for style in (Plain, Silent):
        torch.manual_seed(0)
        module = style("sgd")
        trainer(callbacks=[PSKD(), LoRA(rank=2, **EVERYWHERE)]).fit(module, loader(), loader(8))
        weights.append({name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()})
    torch._dynamo.reset()
    torch.testing.assert_close(*weights, rtol=0, atol=0)
