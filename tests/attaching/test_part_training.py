"""Layer parts in training: their groups, their averages, and calls that do not reach them."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from part_toys import Adapters, AtStep, Frozen, X, parts_of
from torch import nn

from lightning_peft.structure.checkpoint import KEY
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, loader
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.testing.toys import LowRankPart, ToyLowRank

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


def test_training_is_that_of_a_loop_by_hand():
    run = fit([ToyLowRank()], style=Frozen, optimizer="sgd")
    torch.manual_seed(0)
    net = Frozen("sgd").model
    parts = [LowRankPart(16, 16, 2, 0), LowRankPart(16, 16, 2, 1), LowRankPart(16, 3, 2, 2)]
    layers = [net[0], net[2], net[4]]
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.02)
    for x, y in loader():
        h = x
        for index, (layer, part) in enumerate(zip(layers, parts, strict=True)):
            h = layer(h) + h @ part.down.T @ part.up.T
            h = h.relu() if index < 2 else h
        optimizer.zero_grad()
        nn.functional.cross_entropy(h, y).backward()
        optimizer.step()
    for layer, part, trained in zip(layers, parts, (run.module.model[i] for i in (0, 2, 4)), strict=True):
        assert torch.allclose(layer.weight + part.up @ part.down, trained.weight, atol=1e-5)
        assert part.up.abs().max() > 0.001


def test_parts_train_in_groups_of_their_own():
    at = AtStep(2, lambda trainer, module: (trainer.optimizers[0].param_groups, next(iter(parts_of(module).values()))))
    with pytest.warns(UserWarning, match="without the part 'adapter' of Adapters on model.0"):
        fit([Adapters()], after=[at])
    groups, part = at.seen
    own = next(group for group in groups if any(p is part.up.weight for p in group["params"]))
    assert {id(p) for p in own["params"]} == {id(p) for p in part.parameters()}
    assert own["lr"] == pytest.approx(groups[0]["lr"] * 0.5)
    assert own["weight_decay"] == 0.0


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_averages_hold_averaged_parts_and_resume_with_them(kind, tmp_path):
    def average():
        return EMAWeightAveraging(decay=0.5) if kind == "EMA" else StochasticWeightAveraging(1e-2, swa_epoch_start=1)

    class Follows(Callback):
        def __init__(self):
            self.expected = None

        def on_train_batch_end(self, trainer, pl_module, *args):
            up = next(iter(parts_of(pl_module).values())).up.detach()
            if self.expected is None:
                self.expected = torch.zeros_like(up)
            self.expected = up.clone() if trainer.global_step == 1 else self.expected * 0.5 + up * 0.5

    follows, ema = Follows(), average()
    full = fit([ToyLowRank()], before=[ema], after=[follows, every_epoch(tmp_path)], max_epochs=3)
    resumed = fit([ToyLowRank()], seed=9, before=[average()], resume=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert_same(full, resumed, "uninterrupted against resumed beside an average")
    if kind == "EMA":
        file = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
        shown = file[KEY]["parts"]["model.0"][0]["state"]["up"]
        assert torch.allclose(shown, follows.expected, atol=1e-6), "the file shows the average, by hand"
        assert not torch.allclose(shown, file[KEY]["part_copies"][0]["model.0"][0]["up"])
        plain = Plain.load_from_checkpoint(tmp_path / "epoch=2.ckpt", weights_only=True)
        assert torch.allclose(plain(X), full.module(X), atol=1e-6), "the average, by the file and after the fit"


class Functional(Plain):
    """Reads a weight without calling its layer."""

    def forward(self, x):
        first = self.model[0]
        return self.model[1:](nn.functional.linear(x, first.weight, first.bias))


def test_a_weight_that_is_read_without_a_call_is_found_at_the_first_step():
    with pytest.raises(MisconfigurationException, match=r"model\.0\.weight has a gradient, but.*not called.*exclude=\['model"):
        fit([ToyLowRank()], style=Functional)
    fit([ToyLowRank(exclude=["model.0"])], style=Functional)


class Spare(Frozen):
    def forward(self, x):
        return self.model[2:](x)


def test_a_part_that_no_call_reaches_is_warned_of():
    with pytest.warns(UserWarning, match="No call of its layer reached the part 'toy_low_rank' of ToyLowRank on model.0,"):
        fit([ToyLowRank()], style=Spare)


class HeadOnly(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.model[4].parameters(), lr=0.1)


def test_a_part_that_no_optimizer_trains_is_warned_of():
    with pytest.warns(UserWarning, match=r"No optimizer trains the part 'toy_low_rank' of ToyLowRank on model\.0 \(1 more\)"):
        fit([ToyLowRank()], style=HeadOnly)
