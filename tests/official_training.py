"""A module that trains a network as the official codes do, and keeps what those runs recorded."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch.nn import functional as F

from lightning_peft.testing.modules import trainer


class Learner(LightningModule):
    """Cross entropy and SGD; keeps the loss of each step and the weights that the optimizer holds at the end.

    Those are the stored weights, in the order of ``net.parameters()``; what a layer computes with may differ.
    """

    def __init__(self, net, lr, **sgd):
        super().__init__()
        self.net, self.sgd = net.train(), {"lr": lr, **sgd}
        self.losses, self.stored = [], {}
        self.names = [name for name, _ in net.named_parameters()]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_train_end(self):
        held = self.trainer.optimizers[0].param_groups[0]["params"]
        self.stored = {name: p.detach().clone() for name, p in zip(self.names, held, strict=True)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), **self.sgd)


def trained(net, method, loader, epochs, lr, **sgd):
    """Fit a network in double precision with a method attached."""
    module = Learner(net, lr, **sgd)
    trainer(callbacks=[method], max_epochs=epochs, precision="64-true").fit(module, loader)
    return module
