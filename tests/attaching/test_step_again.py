"""A step that is evaluated once more leaves gradients and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from step_toys import RADIUS, SGD, Backwards, seeded
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.compose.loss import NonFiniteLossError
from lightning_peft.testing.modules import DictOutput, Plain, loader
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy, ToySAM, ToyScale, ToyTwice
from lightning_peft.testing.trace import difference


def test_batches_are_told_apart_when_they_come_again():
    class Watches(ToyEntropy):
        def loss(self, step):
            seen.append((step.repeated, step.batch_idx, step.sample_index.tolist(), step.batch[0][0, 0].item()))
            return super().loss(step)

    seen = []
    fit([ToySAM(), Watches()], data=loader(24, 8), accumulate_grad_batches=2)
    inputs = [batch[0][0, 0].item() for batch in loader(24, 8)]
    first, second, third = ((i, [*range(8 * i, 8 * i + 8)], inputs[i]) for i in range(3))
    order = [(False, first), (False, second), (True, first), (True, second), (False, third), (True, third)]
    assert seen == [(repeated, *which) for repeated, which in order]


class Notes(DictOutput):
    def build(self):
        super().build()
        self.model.insert(2, nn.Dropout(0.2))
        self.accuracy = MulticlassAccuracy(3)
        self.logged = 0

    def base_loss(self, batch):
        self.accuracy(self.logits(batch[0]), batch[1])
        return super().base_loss(batch)

    def log(self, *args, **kwargs):
        self.logged += 1
        super().log(*args, **kwargs)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_a_step_evaluated_twice_leaves_what_one_does(settings):
    def trained(*extra):
        counts = Backwards()
        run = fit(
            [ToyEntropy(), ToyScale(), *extra], style=Notes, after=[counts], max_epochs=2, log_every_n_steps=1, **settings
        )
        logged = {name: float(value) for name, value in run.trainer.logged_metrics.items()}
        counted = run.module.accuracy.compute().item(), run.module.accuracy._update_count
        return logged, counted, run.module.logged, counts.seen, dict(run.module.state_dict()), torch.rand(3)

    assert difference(trained(), trained(ToyTwice())) is None


def test_the_losses_logged_are_those_at_the_weights():
    run = fit([ToySAM(RADIUS), ToyEntropy()], style=DictOutput, log_every_n_steps=1, limit_val_batches=0)
    logged = run.trainer.logged_metrics
    assert logged["peft/loss/base"] == logged["loss"]
    assert logged["peft/loss/total"] == logged["peft/loss/base"] + logged["peft/loss/toy_entropy"]


def test_a_loss_that_is_not_finite_elsewhere_leaves_the_weights():
    class Cliff(SGD):
        def base_loss(self, batch):
            changed = not torch.equal(self.model[0].weight, self.held)
            return super().base_loss(batch) * (math.nan if changed else 1.0)

    module = seeded(Cliff)
    module.held = module.model[0].weight.detach().clone()
    with pytest.raises(NonFiniteLossError):
        fit([ToySAM()], module=module)
    assert torch.equal(module.model[0].weight, module.held)


def test_nothing_is_installed_when_nobody_asks():
    class Looks(Callback):
        def on_train_batch_start(self, trainer, module, *args):
            names = {"optimizer_step", "backward"} & set(vars(trainer.strategy))
            names |= {"configure_gradient_clipping"} & set(vars(module))
            seen.append(names)

        on_train_end = on_train_batch_start

    seen = []
    fit([ToyEntropy()], after=[Looks()])
    assert not any(seen)
    run = fit([ToySAM()], after=[Looks()])
    assert seen[-1] == {"optimizer_step"}
    assert not {"optimizer_step", "backward"} & set(vars(run.trainer.strategy))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_fetches_its_batches_is_refused():
    class Fetches(Plain):
        def training_step(self, dataloader_iter):
            return self.base_loss(next(dataloader_iter)[0])

    with pytest.raises(MisconfigurationException, match="Let training_step take the batch"):
        fit([ToySAM()], style=Fetches)
