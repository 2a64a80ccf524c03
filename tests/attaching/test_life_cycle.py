"""Lightning's own features beside methods: compiled modules, other callbacks, averages, steps taken by hand, fits cut short."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from lightning_peft import (
    PSKD,
    BlockPruning,
    LayerGrowth,
    MaskedPruning,
    NMSparsity,
    StructuredPruning,
    TrainedRankPruning,
    WeightCompander,
)
from lightning_peft.attaching.plan import ConflictError
from lightning_peft.compose.lanes import Lane
from lightning_peft.method import Method
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import CLASSES, Manual, Plain, TwoOptimizers, deepened, loader, mlp, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold


class ByHand(Plain):
    """Steps inside ``training_step`` although Lightning optimizes, with its own optimizer or Lightning's."""

    known = True

    def training_step(self, batch, batch_idx):
        own = self.optimizers().optimizer if self.known else self.own
        own.zero_grad()
        self.base_loss(batch).backward()
        own.step()

    def configure_optimizers(self):
        if self.known:
            return super().configure_optimizers()
        self.__dict__["own"] = super().configure_optimizers()
        return None


class ByHandAlone(ByHand):
    known = False


class OwnOptimizer(Manual):
    """Optimizes by hand with an optimizer Lightning never hears of, beside one that it is given and that never steps."""

    def training_step(self, batch, batch_idx):
        own = self.__dict__.setdefault("own", torch.optim.SGD(self.parameters(), 0.1))
        own.zero_grad()
        self.base_loss(batch).backward()
        own.step()


class WithoutTorch(Plain):
    """Descends by arithmetic."""

    def training_step(self, batch, batch_idx):
        for parameter, gradient in zip(
            self.parameters(), torch.autograd.grad(self.base_loss(batch), list(self.parameters())), strict=True
        ):
            parameter.data -= 0.1 * gradient


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`:UserWarning")
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@pytest.mark.parametrize("method", [ToyEntropy, ToyScale, lambda: StructuredPruning(0.3), PSKD])
@pytest.mark.parametrize("style", [ByHand, ByHandAlone, WithoutTorch])
def test_steps_by_hand_under_automatic_optimization(style, method):
    torch.manual_seed(0)
    module = style("sgd")
    method = method()
    message = rf"{style.__name__}.training_step (takes optimizer|returned no loss).*{method.name} would.*apply_terms"
    with pytest.raises(MisconfigurationException, match=message):
        fit([method], module=module, max_epochs=2)
    assert "parametrizations" not in str(list(module.state_dict()))


def test_steps_by_hand_with_an_optimizer_lightning_does_not_know():
    with pytest.raises(MisconfigurationException, match=r"OwnOptimizer.training_step takes steps only with optimizers"):
        fit([ToyScale()], style=OwnOptimizer)


def test_the_cures_of_steps_by_hand():
    for style in (Plain, Manual):
        assert fit([ToyEntropy(), ToyScale()], style=style).methods[0].steps == 4


class Skips(Plain):
    """Leaves out a batch now and then, as Lightning allows."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_step_may_be_skipped():
    assert fit([ToyEntropy(), ToyScale()], style=Skips).losses


class Stops(Plain):
    """Trains for one epoch."""

    def training_step(self, batch, batch_idx):
        return None if self.current_epoch else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_every_epoch_is_looked_at():
    with pytest.raises(MisconfigurationException, match="returned no loss in a whole epoch"):
        fit([ToyScale()], style=Stops, max_epochs=2)


class Head(Plain):
    """Steps its last layer by itself, beside the loss it returns."""

    def training_step(self, batch, batch_idx):
        self.step_head(batch)
        return super().training_step(batch, batch_idx)

    def step_head(self, batch):
        own = self.__dict__.setdefault("own", torch.optim.SGD(self.model[4].parameters(), 0.1))
        self.base_loss(batch).backward()
        own.step()
        self.zero_grad()


class HeadByHand(Head, Manual):
    def training_step(self, batch, batch_idx):
        self.step_head(batch)
        Manual.training_step(self, batch, batch_idx)


class Judged(Skips):
    """Trains a network that is no part of it, in batches it leaves out itself."""

    def training_step(self, batch, batch_idx):
        judge = self.__dict__.setdefault("judge", nn.Linear(16, 1))
        judge(batch[0]).sum().backward()
        torch.optim.SGD(judge.parameters(), 0.1).step()
        return super().training_step(batch, batch_idx)


class InTurns(TwoOptimizers):
    """Trains the generator in the first epoch, and both later."""

    def training_step(self, batch, batch_idx):
        if self.current_epoch:
            super().training_step(batch, batch_idx)
        else:
            self.base_loss((self.generator(batch[0][:, :4]), batch[1])).backward()
            self.optimizers()[1].step()


class Waits(Manual):
    def training_step(self, batch, batch_idx):
        if self.current_epoch:
            super().training_step(batch, batch_idx)


class Meanwhile(Callback):
    """Steps between batches."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        pl_module.base_loss(args[1]).backward()
        torch.optim.SGD(pl_module.parameters(), 0.1).step()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@pytest.mark.parametrize(
    ("style", "callbacks", "steps"),
    [(Head, [], 8), (HeadByHand, [], 8), (Judged, [], 8), (InTurns, [], 4), (Waits, [Meanwhile()], 4)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_steps_do_not_matter(style, callbacks, steps):
    run = fit([ToyScale()], style=style, after=callbacks, max_epochs=2)
    assert run.methods[0].steps == steps


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`:UserWarning")
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_steps_by_hand_do_not_matter_to_what_only_reports():
    class Reports(Method):
        lane = Lane.REPORT

    assert fit([Reports()], style=ByHandAlone).losses


def test_no_optimizer_is_watched_after_the_fit():
    before = len(_global_optimizer_post_hooks)
    fit([ToyScale()])
    with pytest.raises(MisconfigurationException):
        fit([ToyScale()], style=OwnOptimizer)
    assert len(_global_optimizer_post_hooks) == before


def test_one_method_twice():
    with pytest.raises(ConflictError, match=r"Two methods are called 'toy_scale': .*name="):
        fit([ToyScale(targets="0"), ToyScale(targets="2")])
    fit([ToyScale(targets="0"), ToyScale(targets="2", name="second")])


def test_fabric():
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[ToyScale()])
    fabric.launch()
    module = mlp()
    with pytest.raises(MisconfigurationException, match=r"toy_scale was given to Fabric.*Trainer\(callbacks="):
        fabric.setup(module, torch.optim.SGD(module.parameters(), 0.1))


def layers(module, *places):
    return [(module.model[place], "weight") for place in places]


@pytest.mark.parametrize("method", [ToyThreshold, lambda: NMSparsity("2:4", exclude=()), WeightCompander])
def test_lightnings_pruning_on_mapped_weights(method):
    module, method = Plain(), method()
    with pytest.raises(MisconfigurationException, match=rf"replaces model.0.weight, which {method.name} maps.*exclude="):
        fit([method], module=module, after=[ModelPruning("l1_unstructured", amount=0.5)])
    apart = [ModelPruning("l1_unstructured", layers(module, 4), amount=0.5)]
    fit([ToyThreshold(exclude="4")], module=module, after=apart)
    assert float((module.model[4].weight == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    beside = [ModelPruning("l1_unstructured", [(module.model[0], "bias")], amount=0.5)]
    fit([ToyThreshold()], module=module, after=beside)
    assert int((module.model[0].bias == 0).sum()) == 8
    fit([ToyScale(), MaskedPruning(0.5, targets="4", exclude=())])


def test_lightnings_pruning_on_weights_that_get_a_gradient():
    module = Plain()
    with pytest.raises(MisconfigurationException, match=r"replaces model\.2\.weight, which trained_rank_pruning gives a"):
        fit([TrainedRankPruning(0.5, period=2)], module=module, after=[ModelPruning("l1_unstructured", amount=0.5)])
    apart = [ModelPruning("l1_unstructured", layers(module, 4), amount=0.5)]
    fit([TrainedRankPruning(0.5, period=2, exclude=["model.4"])], module=module, after=apart)
    assert float((module.model[4].weight == 0).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_lightnings_pruning_beside_a_change_of_structure():
    with pytest.raises(MisconfigurationException, match=r"structured_pruning changes the structure.*MaskedPruning"):
        fit([StructuredPruning(0.3)], after=[ModelPruning("l1_unstructured", amount=0.5)])
    fit([PSKD()], after=[ModelPruning("l1_unstructured", amount=0.5)])


class FinetuningScheduler(Callback):
    """Goes by the name of the one that keeps parameter names in its schedule."""


def test_a_finetuning_schedule_beside_a_change_of_structure():
    def methods():
        return [ToyScale(), StructuredPruning(0.3)]

    with pytest.raises(MisconfigurationException, match=r"structured_pruning changes the parameters that the schedule of Fin"):
        fit(methods(), after=[FinetuningScheduler()])
    fit([ToyScale()], after=[FinetuningScheduler()])
    trainer(callbacks=[*methods(), FinetuningScheduler()]).test(Plain(), loader(), verbose=False)


class Backboned(Plain):
    """What BackboneFinetuning expects."""

    def build(self):
        deepened(Plain).build(self)
        self.backbone, self.head = nn.Sequential(self.blocks, mlp()), nn.Linear(CLASSES, CLASSES)
        del self.blocks, self.model

    def forward(self, inputs):
        return self.head(self.backbone(inputs))

    def configure_optimizers(self):
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


class Shallow(Backboned):
    """Without a residual stream that begins at the input, which cannot be cut."""

    def build(self):
        self.backbone, self.head = mlp(), nn.Linear(CLASSES, CLASSES)


CHANGES = {
    "StructuredPruning": lambda at: StructuredPruning(0.2, start=at),
    "BlockPruning": lambda at: BlockPruning(1, start=at, every=1),
    "LayerGrowth": lambda at: LayerGrowth("stack", at=at, start=2),
}


@pytest.mark.parametrize("at", ["1ep", "2ep"], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_structure_beside_finetuning_resumes(change, at, tmp_path):
    def callbacks():
        return [BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)]

    style = Shallow if change is CHANGES["StructuredPruning"] else Backboned
    at = {"1ep": "step:6", "2ep": "step:10"}[at]
    run = fit([change(at)], style=style, after=[*callbacks(), every_epoch(tmp_path)], max_epochs=4)
    sizes = [sum(map(len, (group["params"] for group in run.trainer.optimizers[0].param_groups)))]
    resumed = fit([change(at)], style=style, seed=3, after=callbacks(), resume=tmp_path / "epoch=2.ckpt", max_epochs=4)
    sizes.append(sum(map(len, (group["params"] for group in resumed.trainer.optimizers[0].param_groups))))
    assert sizes[0] == sizes[1] == len(list(run.module.parameters()))
    assert [name for name, _ in run.module.named_parameters()] == [name for name, _ in resumed.module.named_parameters()]
