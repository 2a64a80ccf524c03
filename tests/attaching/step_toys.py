"""Modules whose steps are evaluated again, and sharpness-aware minimisation of them written by hand in plain torch."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from lightning_peft.testing.modules import BatchNorm, Plain, loader
from lightning_peft.testing.trace import difference

RADIUS = 0.3


class SGD(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Dropout(SGD):
    def build(self):
        super().build()
        self.model.insert(2, nn.Dropout(0.4))

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            torch.manual_seed(batch_idx)


class SGDBatchNorm(SGD):
    build = BatchNorm.build


def seeded(style):
    torch.manual_seed(0)
    return style()


def loss_of(module, batch):
    return F.cross_entropy(module.logits(batch[0]), batch[1])


def backward(module, window, loss_of, context, scaler, states=None):
    """Backward passes of a window, and the states of the generator before each of them."""
    drawn = []
    for place, batch in enumerate(window):
        drawn.append(torch.get_rng_state())
        if states is not None:
            torch.set_rng_state(states[place])
        with context():
            loss = loss_of(module, batch) / len(window)
        (loss if scaler is None else scaler.scale(loss)).backward()
    return drawn


def climb(module, parameters, norm, evaluate, statistics):
    before = [p.detach().clone() for p in parameters]
    buffers, now = copy.deepcopy(list(module.buffers())), torch.get_rng_state()
    with torch.no_grad():
        for p in parameters:
            p.add_(p.grad * (RADIUS / norm))
            p.grad = None
    evaluate()
    torch.set_rng_state(now)
    with torch.no_grad():
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
        if not statistics:
            for buffer, value in zip(module.buffers(), buffers, strict=True):
                buffer.copy_(value)


def by_hand(module, batches, *, accumulate=1, clip=None, context=nullcontext, scaler=None, statistics=False, loss_of=loss_of):
    """Sharpness-aware minimisation of a module by SGD, as one writes it without any library."""
    module.train()
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for start in range(0, len(batches), accumulate):
        torch.manual_seed(start)
        window = batches[start : start + accumulate]
        optimizer.zero_grad()
        states = backward(module, window, loss_of, context, scaler)
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        if norm.isfinite():
            again = partial(backward, module, window, loss_of, context, scaler, states)
            climb(module, parameters, norm, again, statistics)
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        scaler.step(optimizer)
        scaler.update()
    return module


def batches(epochs=2, batch_size=8):
    return [*loader(32, batch_size)] * epochs


def same(hand, run, what):
    found = difference(dict(hand.state_dict()), dict(run.module.state_dict()))
    assert found is None, f"{what}: by hand against the method: {found}"


class Backwards(Callback):
    def __init__(self):
        self.seen = 0

    def on_after_backward(self, *args):
        self.seen += 1
