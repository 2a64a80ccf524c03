"""A forward that counts to a fixed number is told which list got shorter or longer, and runs once it loops over the list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import BlockPruning, LayerGrowth, Method
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + 0.1 * self.linear(inputs).relu()


class Looping(Plain):
    def build(self) -> None:
        self.layers, self.head = nn.ModuleList(Block() for _ in range(6)), nn.Linear(16, 3)

    def logits(self, inputs: Tensor) -> Tensor:
        for block in self.layers:
            inputs = block(inputs)
        return self.head(inputs)


class Counting(Looping):
    def logits(self, inputs: Tensor) -> Tensor:
        for i in range(6):
            inputs = self.layers[i](inputs)
        return self.head(inputs)


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize(
    "method", [lambda: LayerGrowth(at=6, start=2), lambda: BlockPruning(2, start=2)], ids=["growth", "pruning"]
)
def test_the_list_and_the_cure_are_named(method: Callable[[], Method], sanity: int) -> None:
    with pytest.raises(MisconfigurationException, match=r"^layers has [24] blocks now, of 6.*for block in self\.layers:`\.$"):
        fit([method()], style=Counting, max_epochs=2, num_sanity_val_steps=sanity)
    module = fit([method()], style=Looping, max_epochs=2, num_sanity_val_steps=sanity).module
    assert "validation_step" not in vars(module)


def test_other_index_errors_stay_what_they_are() -> None:
    class Broken(Looping):
        def logits(self, inputs: Tensor) -> Tensor:
            return super().logits(inputs) + torch.zeros(3)[[3]]

    with pytest.raises(IndexError, match="out of bounds"):
        fit([LayerGrowth(at=6, start=2)], style=Broken, max_epochs=1)


class Cached(Looping):
    """Keeps something for each block in a list of its own, as transformers' caches do."""

    def logits(self, inputs: Tensor) -> Tensor:
        kept = [inputs] * 6
        for i, block in enumerate(self.layers):
            kept[i] = inputs = block(inputs)
        return self.head(inputs)


def test_what_counts_new_blocks_elsewhere_is_said_in_the_first_step_only() -> None:
    with pytest.raises(MisconfigurationException, match=r"^IndexError: list .* layers went from 6 to 8 blocks.*blocks="):
        fit([LayerGrowth("stack", at=2, to=8)], style=Cached, max_epochs=1)

    class LastStep(Looping):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx if batch_idx < 3 else [0][batch_idx])

    with pytest.raises(IndexError, match="list index out of range"):
        fit([LayerGrowth("stack", at=2, to=8)], style=LastStep, max_epochs=1)


class Concatenating(nn.Module):
    """What its blocks return stands side by side, as in VoVNet."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.last = nn.ModuleList(Block() for _ in range(3)), nn.Linear(48, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.cat([part(inputs) for part in self.parts], 1))


class Wide(Plain):
    def build(self) -> None:
        self.model = Concatenating()


@pytest.mark.filterwarnings("ignore:.*promises that:UserWarning")
@pytest.mark.parametrize(
    ("method", "went"),
    [
        (lambda: LayerGrowth("stack", at=2, to=4, blocks="model.parts"), "3 to 4"),
        (lambda: LayerGrowth("ligo", at=2, to=4, blocks="model.parts"), "3 to 4"),
        (lambda: LayerGrowth("stack", at=2, start=2, blocks="model.parts"), "3 to 2"),
    ],
    ids=["grown", "learnt", "begun"],
)
def test_lists_that_are_no_chain_are_named(method: Callable[[], Method], went: str) -> None:
    with pytest.raises(
        MisconfigurationException, match=rf"^RuntimeError: .*shapes.* model\.parts went from {went} blocks.*blocks="
    ):
        fit([method()], style=Wide, max_epochs=1)
