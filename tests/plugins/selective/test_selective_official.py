"""LIFT, SpIEL and SaRA beside runs of their official codes; what those chose and computed is in tests/fixtures."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from official_training import Learner
from official_values import filled, marks, values_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LIFT, SaRA
from lightning_peft.functional import reallocated, seeded_moments
from lightning_peft.testing.modules import trainer

RECORDED = values_of("selective_official")
WINDOW = 5


class Sines(LightningModule):
    """The network of the recorded run, and its Adam, whose ``eps`` is too small to matter where it is added."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
        self.net = filled(nn.Sequential(*layers), 0.6).float().train()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)


class Chosen(Callback):
    """Coordinates before and after the training."""

    def __init__(self, method: LIFT) -> None:
        self.method = method

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.first = [values.indices.tolist() for _, values in self.method.maps(pl_module)]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.last = [values.indices.tolist() for _, values in self.method.maps(pl_module)]


def test_lift_trains_as_the_official_code_told_to_take_the_largest() -> None:
    """Eight steps, with a new choice after the fifth."""
    images = torch.sin(torch.arange(32 * 6, dtype=torch.float64) * 0.9).view(32, 6).float()
    method, module = LIFT(rank=1, filter_rank=1, every=5), Sines()
    chosen = Chosen(method)
    data = DataLoader(TensorDataset(images, torch.arange(32) % 3), batch_size=4)
    trainer(callbacks=[method, chosen]).fit(module, data)
    expected = RECORDED["lift"]["largest"]
    assert chosen.first == expected["first"]
    assert chosen.last == expected["last"]
    assert chosen.first != chosen.last
    torch.testing.assert_close(module.losses, expected["losses"], rtol=1e-5, atol=1e-6)
    weights = [marks(module.net[place].weight.detach()) for place in (0, 2)]
    torch.testing.assert_close(torch.tensor(weights), torch.tensor(expected["weights"]), rtol=1e-5, atol=1e-5)


def test_the_published_name_of_the_mask_takes_the_smallest() -> None:
    """What the card says of the official code: with ``lift_sparse`` it begins with coordinates that ours leaves alone."""
    chosen, published = (RECORDED["lift"][name]["first"] for name in ("largest", "published"))
    for ours, theirs, size in zip(chosen, published, (48, 64), strict=True):
        assert len(ours) == len(theirs) == {48: 14, 64: 16}[size]
        assert not set(ours) & set(theirs)


@pytest.mark.parametrize("case", RECORDED["spiel"]["cases"], ids=lambda case: f"{len(case['values'])} values")
def test_spiel_drops_and_grows_what_the_official_code_does(case: dict[str, Any]) -> None:
    values, indices, candidates, gradients, squares = (
        torch.tensor(case[name]) for name in ("values", "indices", "candidates", "gradients", "squares")
    )
    slots, places = reallocated(values, indices, candidates, gradients, int(len(values) * case["share"]))
    after = indices.clone()
    after[slots] = candidates[places]
    assert set(after.tolist()) == set(case["after"])
    grown = {i: place for place, i in enumerate(case["after"]) if case["age"][place] == WINDOW}
    assert grown.keys() == set(candidates[places].tolist())
    moments = seeded_moments(gradients[places], squares[places], WINDOW, (0.9, 0.999))
    for key, found in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        expected = torch.tensor([case[key][grown[int(i)]] for i in candidates[places]])
        torch.testing.assert_close(found, expected)
    kept = {int(i): float(value) for i, value in zip(indices, values, strict=True)}
    expected_values = {i: 0.0 if i in grown else kept[i] for i in after.tolist()}
    recorded = dict(zip(case["after"], case["kept"], strict=True))
    assert {i: round(value, 3) for i, value in recorded.items()} == {i: round(value, 3) for i, value in expected_values.items()}


def without_bias(*sizes: int) -> nn.Sequential:
    """Linear layers and rectifiers, filled with sines in double precision."""
    layers = [nn.Linear(*pair, bias=False) for pair in pairwise(sizes)]
    return filled(nn.Sequential(*[each for layer in layers for each in (layer, nn.ReLU())][:-1]).double(), 0.6)


def test_sara_trains_as_the_official_code_where_no_sign_is_lost() -> None:
    """Eight steps of a network whose small entries are above zero. The official norm reaches no parameter: it was left out."""
    net = without_bias(6, 8, 8, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.where(parameter.abs() < 0.3, parameter.abs(), parameter))
    images = torch.sin(torch.arange(32 * 6, dtype=torch.float64) * 0.9).view(32, 6)
    data = DataLoader(TensorDataset(images, torch.arange(32) % 3), batch_size=4)
    module = Learner(net, 0.02, torch.optim.AdamW, weight_decay=0.0)
    method = SaRA(threshold=0.3, nuclear=0.0, reselect=None, exclude=())
    trainer(callbacks=[method], precision="64-true").fit(module, data)
    torch.testing.assert_close(module.losses, RECORDED["sara"]["losses"], rtol=1e-9, atol=1e-9)
    weights = [marks(net[place].weight.detach()) for place in (0, 2, 4)]
    torch.testing.assert_close(weights, RECORDED["sara"]["weights"], rtol=1e-9, atol=1e-9)


def test_the_official_code_of_sara_begins_with_other_signs() -> None:
    """What the card says of it: every small entry below zero is changed before the first step."""
    weight = without_bias(6, 8)[0].weight.detach().flatten()
    assert ((weight < 0) & (weight > -0.3)).nonzero().flatten().tolist() == RECORDED["sara"]["flipped"]
