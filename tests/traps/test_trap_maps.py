"""Lightning and torch traps T12, T13, T17, T18, T26: weights under a map, and the optimizer state that belongs to them."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler

from lightning_peft.structure.checkpoint import CheckpointError
from lightning_peft.testing import Plain, trainer
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import loader
from lightning_peft.testing.runs import assert_clean, fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold


@pytest.mark.parametrize(
    ("saved_with", "resumed_with"),
    [([], [ToyScale]), ([ToyScale], []), ([ToyScale, ToyThreshold], [ToyThreshold]), ([ToyThreshold], [ToyScale])],
    ids=["added", "removed", "one-removed", "replaced"],
)
def test_t12_optimizer_state_never_lands_on_other_parameters(saved_with, resumed_with, tmp_path):
    """T12: Lightning loads optimizer state by position, silently, whatever the parameters are now."""
    fit([ToyEntropy(), *(method() for method in saved_with)], after=[every_epoch(tmp_path)])
    torch.manual_seed(3)
    module = Plain()
    methods = [ToyEntropy(), *(method() for method in resumed_with)]
    with pytest.raises(CheckpointError, match="optimizer state would land on the wrong parameters"):
        fit(methods, module=module, resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert_clean(module, "a refused resume")


class Scheduled(Plain):
    schedule = "lambda"

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        scheduler = {
            "lambda": lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
            "onecycle": lambda: lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20),
            "sequential": lambda: lr_scheduler.SequentialLR(
                optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, 10)], [2]
            ),
        }[self.schedule]()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("schedule", ["lambda", "onecycle", "sequential"])
def test_t13_a_map_with_parameters_joins_a_scheduled_optimizer(schedule, tmp_path):
    """T13: `add_param_group` under a scheduler fails in `zip` or with a KeyError; ours trains and resumes exactly."""
    style = type("Scheduled", (Scheduled,), {"schedule": schedule})
    full = fit([ToyScale()], style=style, after=[every_epoch(tmp_path)], max_epochs=2)
    groups = full.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in groups] == [6, 3]
    assert groups[0]["lr"] == groups[1]["lr"] != 0.02
    resumed = fit([ToyScale()], style=style, seed=4, resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert all(torch.equal(p, q) for p, q in zip(full.module.parameters(), resumed.module.parameters(), strict=True))


def test_t13_a_map_joins_an_optimizer_of_named_parameters():
    class Named(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.named_parameters(), lr=0.02, weight_decay=0.1)

    groups = fit([ToyScale()], style=Named).trainer.optimizers[0].param_groups
    assert [group["param_names"] for group in groups] == [
        ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"],
        [f"{place}.parametrizations.weight.0.scale" for place in (0, 2, 4)],  # as the part that was asked calls them
    ]


@pytest.mark.parametrize("old", [True, False], ids=["old-hook", "parametrization"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_t17_weight_norm_is_refused_with_a_way_out(old):
    """T17: weight_norm inside or outside our map breaks at first use or is lost; it is refused before anything happens."""
    torch.manual_seed(0)
    module = Plain()
    (nn.utils.weight_norm if old else parametrizations.weight_norm)(module.model[2])
    keys = list(module.state_dict())
    with pytest.raises(MisconfigurationException, match=r"exclude=\['model.2'\]"):
        fit([ToyScale()], module=module)
    assert list(module.state_dict()) == keys
    assert all(type(module.model[i]) is nn.Linear for i in (0, 4))
    fit([ToyScale(exclude="model.2")], module=module)
    assert list(module.state_dict()) == keys


def test_t18_names_classes_and_parameter_objects_come_back():
    """T18: parametrize renames keys, swaps classes and reorders parameters; after the fit all is as before."""
    torch.manual_seed(0)
    module = Plain()
    before = dict(module.named_parameters())
    during = []

    class Look(ToyThreshold):
        def start(self, run):
            during.extend(run.module.state_dict())
            assert type(run.module.model[0]) is not nn.Linear

    fit([ToyScale(), Look()], module=module)
    assert "model.0.parametrizations.weight.original" in during
    assert "model.0.parametrizations.weight.0.scale" in during
    assert list(module.named_parameters()) == [(name, before[name]) for name in before]
    assert all(value is before[name] for name, value in module.named_parameters())
    assert type(module.model[0]) is nn.Linear
    assert_clean(module, "two maps on each tensor")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
def test_t26_sparsity_survives_resume_and_test(tmp_path):
    """T26: Lightning's ModelPruning loses its masks on resume; here the resumed and the tested module stay sparse."""

    def zeros(module):
        return {name: int((value == 0).sum()) for name, value in module.named_parameters() if name.endswith("weight")}

    full = fit([ToyThreshold(0.1)], after=[every_epoch(tmp_path)], max_epochs=2)
    resumed = fit([ToyThreshold(0.1)], seed=9, resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert min(zeros(full.module).values()) > 0
    assert zeros(resumed.module) == zeros(full.module)
    seen = []

    class Tested(Plain):
        def test_step(self, batch, batch_idx):
            seen.append(sum(int((layer.weight == 0).sum()) for layer in self.model if isinstance(layer, nn.Linear)))

    trainer(callbacks=[ToyThreshold(0.1)]).test(
        Tested(), loader(8), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True, verbose=False
    )
    assert seen == [sum(zeros(full.module).values())]
