"""Steps evaluated once more in modules that optimise by hand."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from step_toys import RADIUS, Backwards, batches, loss_of, same, seeded

from lightning_peft import apply_terms
from lightning_peft.testing.modules import Manual, TwoOptimizers
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy, ToyNoise, ToySAM, ToyTwice
from lightning_peft.testing.trace import difference


class Closures(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        classifier, generator = self.optimizers()

        def classify():
            classifier.zero_grad()
            loss = apply_terms(self, self.base_loss(batch))
            self.manual_backward(loss)
            return loss

        def generate():
            generator.zero_grad()
            loss = self.model(self.generator(batch[0][:, :4]))[:, 0].mean()
            self.manual_backward(loss)
            return loss

        classifier.step(closure=classify)
        generator.step(closure=generate)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.model, self.generator)]


def test_sam_of_two_optimizers_by_hand():
    hand = seeded(Closures)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (hand.model, hand.generator)]
    losses = [loss_of, lambda module, batch: module.model(module.generator(batch[0][:, :4]))[:, 0].mean()]
    for batch in batches():
        for optimizer, loss in zip(optimizers, losses, strict=True):
            parameters = optimizer.param_groups[0]["params"]
            optimizer.zero_grad()
            loss(hand, batch).backward()
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            before = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p in parameters:
                    p.add_(p.grad * (RADIUS / norm))
            optimizer.zero_grad()
            loss(hand, batch).backward()
            with torch.no_grad():
                for p, value in zip(parameters, before, strict=True):
                    p.copy_(value)
            optimizer.step()
    run = fit([ToySAM(RADIUS)], module=seeded(Closures), max_epochs=2)
    same(hand, run, "two optimizers")


def test_a_step_by_hand_evaluated_twice_leaves_what_one_does():
    def trained(*extra):
        counts = Backwards()
        run = fit([ToyEntropy(), *extra], style=Closures, after=[counts], max_epochs=2)
        return counts.seen, run.methods[0].state(), dict(run.module.state_dict())

    assert difference(trained(), trained(ToyTwice())) is None


class Adds(Closures):
    """Accumulates two batches by hand, of which a closure knows the last alone."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[0]
        if batch_idx % 2 == 0:
            self.manual_backward(apply_terms(self, self.base_loss(batch)))
        else:
            optimizer.step(closure=lambda: self.manual_backward(apply_terms(self, self.base_loss(batch))))
            optimizer.zero_grad()


@pytest.mark.parametrize(("style", "message"), [(Manual, "got no closure"), (Adds, "adds to the gradients of the last call")])
def test_what_cannot_be_computed_again_is_refused(style, message):
    with pytest.raises(MisconfigurationException, match=rf"{message}.*toy_sam|toy_sam.*{message}.*optimizer.zero_grad\(\)"):
        fit([ToySAM()], style=style)
    fit([ToyNoise()], style=style)  # which needs no second evaluation
