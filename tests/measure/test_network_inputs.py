"""Inputs come from the module's own test loop, whatever its batches look like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.measure.network_inputs import NetworkInputs
from lightning_peft.testing.modules import HuggingFace, Plain, loader, trainer


def collected(module: Plain, data: Any = None) -> NetworkInputs:
    found = NetworkInputs()
    trainer(callbacks=[found]).test(module, loader() if data is None else data, verbose=False)
    assert "forward" not in vars(module.model)  # nothing stays on the network
    return found


def test_positional_and_keyword_inputs_are_told_apart() -> None:
    data = list(loader())
    found = collected(Plain())
    assert [type(inputs) for inputs in found.inputs] == [tuple] * 4
    assert all(torch.equal(inputs[0], batch[0]) for inputs, batch in zip(found.inputs, data, strict=True))
    assert all(torch.equal(labels, batch[1]) for labels, batch in zip(found.labels, data, strict=True))
    assert list(collected(HuggingFace()).inputs[0]) == ["input_values"]


class WithLoss(nn.Module):
    """Takes labels to compute its loss, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(inputs)}


class Whole(Plain):
    """Gives its network the whole batch, in a way each test sets."""

    def build(self) -> None:
        self.model = WithLoss()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.use(batch)


def test_labels_are_no_inputs() -> None:
    module = Whole()
    module.use = lambda batch: module.model(**batch)
    batches = [{"inputs": inputs, "labels": labels} for inputs, labels in loader()]
    found = collected(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert list(found.inputs[0]) == ["inputs"]
    assert found.labels[0] is not None


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda module, batch: None, "does not call model"),
        (lambda module, batch: module.model(batch[0], labels=batch[1] + 0), "positional and keyword"),
    ],
)
def test_what_gives_no_example_is_refused_and_leaves_no_trace(use: Any, reason: str) -> None:
    module = Whole()
    module.use = lambda batch: use(module, batch)
    with pytest.raises(MisconfigurationException, match=reason):
        collected(module)
    assert "forward" not in vars(module.model)
