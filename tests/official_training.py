"""Modules that train a network as the official codes do, and keep what those runs recorded."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch.nn import functional as F

from lightning_peft.testing.modules import trainer


class Learner(LightningModule):
    """Cross entropy; keeps the loss of each step."""

    def __init__(self, net, lr, kind=torch.optim.SGD, **options):
        super().__init__()
        self.net, self.kind, self.options = net.train(), kind, {"lr": lr, **options}
        self.losses = []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return self.kind(self.net.parameters(), **self.options)


class StoredLearner(Learner):
    """Keeps the weights that the optimizer holds at the end, too; what a layer computes with may differ.

    They are in the order of ``net.parameters()``.
    """

    def on_fit_start(self):
        self.names = [name for name, _ in self.net.named_parameters()]

    def on_train_end(self):
        held = self.trainer.optimizers[0].param_groups[0]["params"]
        self.stored = {name: p.detach().clone() for name, p in zip(self.names, held, strict=True)}


def trained(net, method, loader, epochs, lr, **options):
    """Fit a network in double precision with a method attached."""
    module = StoredLearner(net, lr, **options)
    trainer(callbacks=[method], max_epochs=epochs, precision="64-true").fit(module, loader)
    return module
