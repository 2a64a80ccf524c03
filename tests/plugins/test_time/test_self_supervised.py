"""SelfSupervisedAdapt beside a loop written by hand, on a regression whose batches are dictionaries."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_peft import SelfSupervisedAdapt
from lightning_peft.capture.evaluation import Call
from lightning_peft.testing.modules import trainer


class Pose(LightningModule):
    """Regresses two numbers from eight, and restores what was masked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.pose, self.decoder = nn.Linear(8, 6), nn.Linear(6, 2), nn.Linear(6, 8)
        self.double()
        self.predictions = []

    def forward(self, signal, restore=False):
        hidden = self.encoder(signal).tanh()
        return {"pose": self.pose(hidden), "restored": self.decoder(hidden)}

    def restoration(self, batch):
        loss = F.mse_loss(self(batch["signal"] * batch["mask"])["restored"], batch["signal"])
        self.log("restoration", loss, batch_size=1)
        return loss

    def test_step(self, batch, batch_idx):
        self.predictions.append(self(batch["signal"])["pose"])
        self.log("error", F.l1_loss(self.predictions[-1], batch["pose"]), batch_size=len(batch["pose"]))


class TwoLooks(Pose):
    def test_step(self, batch, batch_idx):
        self(batch["signal"].flip(-1))
        super().test_step(batch, batch_idx)


def data(samples=12, size=4):
    draw = torch.Generator().manual_seed(1)
    rows = [
        {
            "signal": torch.randn(8, generator=draw, dtype=torch.float64),
            "mask": (torch.rand(8, generator=draw) > 0.3).double(),
            "pose": torch.zeros(2, dtype=torch.float64),
        }
        for _ in range(samples)
    ]
    return DataLoader(rows, batch_size=size)


def ours(*methods, module=None, loader=None, **settings):
    module = Pose() if module is None else module
    runner = trainer(callbacks=list(methods), **settings)
    runner.test(module, loader or data(), verbose=False)
    return [p.clone() for p in module.predictions], runner


def by_hand(reset, steps, lr, momentum):
    module, predictions = Pose(), []
    source = copy.deepcopy(module.state_dict())

    def fresh():
        module.load_state_dict(source)
        return torch.optim.SGD(module.parameters(), lr, momentum)

    optimizer = fresh()
    for batch in data(size=1 if reset == "sample" else 4):
        if reset in ("batch", "sample"):
            optimizer = fresh()
        for _ in range(steps):
            loss = F.mse_loss(module(batch["signal"] * batch["mask"])["restored"], batch["signal"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        predictions.append(module(batch["signal"])["pose"].detach())
    return torch.cat(predictions)


@pytest.mark.parametrize("reset", ["never", "batch", "sample"])
def test_it_is_the_loop(reset):
    method = SelfSupervisedAdapt("restoration", lr=0.3, momentum=0.5, steps=2, reset=reset)
    found, runner = ours(method)
    torch.testing.assert_close(torch.cat(found), by_hand(reset, 2, 0.3, 0.5), rtol=1e-12, atol=1e-12)
    assert "restoration" not in runner.callback_metrics, "the objective logged, and it is no part of the step"
    same, _ = ours(SelfSupervisedAdapt(Pose.restoration, lr=0.3, momentum=0.5, steps=2, reset=reset))
    torch.testing.assert_close(same, found, rtol=0, atol=0)


def test_every_so_many_updates():
    whole, _ = ours(SelfSupervisedAdapt("restoration", lr=0.3, reset=2))
    first, _ = ours(SelfSupervisedAdapt("restoration", lr=0.3), loader=data(8))
    torch.testing.assert_close(whole[:2], first, rtol=0, atol=0)
    alone, _ = ours(SelfSupervisedAdapt("restoration", lr=0.3, reset="batch"))
    torch.testing.assert_close(whole[2], alone[2], rtol=0, atol=0)


def test_only_targets_move():
    module = Pose()
    before = copy.deepcopy(module.state_dict())
    ours(SelfSupervisedAdapt("restoration", lr=0.3, targets=["encoder"], keep=True), module=module)
    assert {n for n, v in module.state_dict().items() if not torch.equal(v, before[n])} == {"encoder.weight", "encoder.bias"}


def test_a_step_that_looks_twice_adapts_once_a_batch():
    twice, _ = ours(SelfSupervisedAdapt("restoration", lr=0.3), module=TwoLooks())
    once, _ = ours(SelfSupervisedAdapt("restoration", lr=0.3))
    torch.testing.assert_close(twice, once, rtol=0, atol=0)
    with pytest.raises(MisconfigurationException, match='reset="batch" and a batch size of 1'):
        ours(SelfSupervisedAdapt("restoration", lr=0.3, reset="sample"), module=TwoLooks())
    cured, _ = ours(SelfSupervisedAdapt("restoration", lr=0.3, reset="batch"), module=TwoLooks(), loader=data(4, 1))
    assert len(cured) == 4


def test_a_spoilt_sample_costs_its_own_prediction():
    spoilt = list(data(4, 1).dataset)
    spoilt[1] = {**spoilt[1], "signal": torch.full((8,), torch.nan, dtype=torch.float64)}
    found, _ = ours(SelfSupervisedAdapt("restoration", lr=0.3), loader=DataLoader(spoilt, batch_size=4))
    sound, _ = ours(SelfSupervisedAdapt("restoration", lr=0.3), loader=DataLoader([*spoilt[:1], *spoilt[2:]], batch_size=3))
    torch.testing.assert_close(found[0][[0, 2, 3]], sound[0], rtol=1e-12, atol=1e-12)
    assert found[0][1].isnan().all()


def test_objectives_that_are_none_are_refused():
    with pytest.raises(MisconfigurationException, match="Did you mean restoration"):
        ours(SelfSupervisedAdapt("restoraton"))
    with pytest.raises(MisconfigurationException, match=r"tensor of shape \(4,\).*Take the mean"):
        ours(SelfSupervisedAdapt(lambda module, batch: module(batch["signal"])["pose"].mean(1)))
    with pytest.raises(MisconfigurationException, match="no parameter which moves"):
        ours(SelfSupervisedAdapt("restoration", targets=["pose"]))
    with pytest.raises(MisconfigurationException, match="nothing to keep"):
        SelfSupervisedAdapt("restoration", reset="sample", keep=True)


class Opaque:
    """A batch whose tensors nobody can reach."""

    def __init__(self, rows):
        self.rows = data().collate_fn(rows)

    def __getitem__(self, key):
        return self.rows[key]


def test_a_batch_that_cannot_be_looked_into():
    def collate(rows):
        return Opaque(rows)

    hidden = DataLoader(data().dataset, batch_size=4, collate_fn=collate)
    with pytest.raises(MisconfigurationException, match=r"Opaque.*Trainer\(inference_mode=False\)"):
        ours(SelfSupervisedAdapt("restoration", lr=0.3), loader=hidden)
    cured, _ = ours(SelfSupervisedAdapt("restoration", lr=0.3), loader=hidden, inference_mode=False)
    torch.testing.assert_close(cured, ours(SelfSupervisedAdapt("restoration", lr=0.3))[0], rtol=0, atol=0)


def test_samples_that_a_method_keeps_hold_no_batches():
    batch, call = object(), Call(len, (torch.zeros(4, 2),), {})
    kept = replace(call, batch=batch).take(slice(0, 1))
    assert replace(call, batch=batch).with_inputs(abs).batch is batch
    assert kept.batch is None
    assert Call.gather([replace(call, batch=batch), kept]).batch is None
