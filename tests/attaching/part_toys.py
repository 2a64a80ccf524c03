"""A layer part that no weight can stand for, its method, and what tests look at in a training with parts."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_peft import Lane, LayerPart, Method
from lightning_peft.testing.modules import Plain
from lightning_peft.weights.parts import placed_parts

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class Adapter(LayerPart):
    """No weight does what it does."""

    kind, lane, lr_scale, optimizer_overrides = "adapter", Lane.DELTA, 0.5, {"weight_decay": 0.0}

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(16, 2), nn.Linear(2, 16)

    def forward(self, output, inputs):
        return output + self.up(self.down(inputs).tanh())


class Adapters(Method):
    lane, parts = Lane.DELTA, (Adapter,)

    def attach(self, module):
        torch.manual_seed(3)
        self.put_part(module, "model.0", Adapter())


class Frozen(Plain):
    """Only what is not the network's own is trained."""

    def __init__(self, optimizer="adam"):
        super().__init__(optimizer)
        self.model.requires_grad_(False)


class Answers(Plain):
    def on_test_epoch_end(self):
        self.answer = self(X)

    def test_step(self, batch, batch_idx):
        return None


def parts_of(module):
    return {placed.name: placed.part for placed in placed_parts(module)}


class AtStep(Callback):
    """Keeps what a function says of the module after a step."""

    def __init__(self, step, look):
        self.step, self.look, self.seen = step, look, None

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            self.seen = self.look(trainer, pl_module)
