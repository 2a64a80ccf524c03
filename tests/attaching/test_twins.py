from __future__ import annotations

import ast
import copy
import re
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn

import lightning_peft
from lightning_peft import NMSparsity
from lightning_peft.attaching.twins import twins, warn_of_twins
from lightning_peft.compose.lanes import Lane
from lightning_peft.testing.modules import Plain, mlp
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ScaleMap, ThresholdMap, ToyScale
from lightning_peft.weights.maps import WeightMap, attach_map


class Momentum(Plain):
    """A teacher follows the network by the position of its parameters, as in BYOL, MoCo and DINO."""

    def build(self) -> None:
        super().build()
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast, 0.5)
        return self.base_loss(batch)

    def configure_optimizers(self):
        return self.make_optimizer(self.model.parameters())


class Beside(Momentum):
    """Has one more layer, beside teacher and student."""

    def build(self) -> None:
        super().build()
        self.extra = nn.Linear(3, 3)

    def forward(self, inputs):
        return self.extra(self.model(inputs))

    def configure_optimizers(self):
        return self.make_optimizer([*self.model.parameters(), *self.extra.parameters()])


def test_a_copy_of_a_reparametrised_weight_is_found_and_no_other():
    net = nn.Module()
    torch.manual_seed(0)
    net.student, net.other = mlp(), mlp()
    net.teacher = copy.deepcopy(net.student)
    for part in (net.student, net.other, net.teacher):
        nn.init.zeros_(part[0].bias)
    for name in ("student.0.weight", "student.0.bias"):
        attach_map(net, name, ScaleMap())
    attach_map(net, "student.2.weight", ThresholdMap())
    assert twins(net) == {"student.0.weight": "teacher.0.weight"}
    attach_map(net, "teacher.0.weight", ScaleMap())
    assert twins(net) == {}


class Doubled(WeightMap):
    kind, lane = "doubled", Lane.REPARAM

    def forward(self, weight):
        return 2.0 * weight


def test_ties_and_tensors_without_values_are_no_copies():
    net = nn.ModuleDict({"one": nn.Linear(4, 4, bias=False), "same": nn.Linear(4, 4, bias=False)})
    net["same"].weight = net["one"].weight
    net["elsewhere"] = nn.Linear(4, 4, bias=False, device="meta")
    net["empty"], net["hollow"] = nn.ParameterList([torch.empty(0)]), nn.ParameterList([torch.empty(0)])
    for name in ("one.weight", "empty.0"):
        attach_map(net, name, Doubled())
    assert twins(net) == {}


def test_a_teacher_is_warned_of_and_the_advice_is_right():
    with pytest.warns(UserWarning, match=r"teacher\.0\.weight is a copy of model\.0\.weight, and 2 more") as caught:
        fit([ToyScale(exclude=r"re:^teacher\.")], style=Momentum)
    advice = re.search(r"exclude=(\[.*\])\.$", str(caught[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="The .*dataloader. does not have many workers")
        warnings.filterwarnings("ignore", message="The number of training batches")
        method = ToyScale(exclude=ast.literal_eval(advice[1]))
        run = fit([method], style=Beside)
    assert list(method.claims(run.module)) == ["extra.weight"]


def test_a_single_layer_is_named():
    net = nn.Module()
    net.fc = nn.Linear(4, 4)
    net.slow = copy.deepcopy(net.fc)
    attach_map(net, "fc.weight", ScaleMap())
    with pytest.warns(UserWarning, match=r"exclude=\['fc', 'slow'\]"):
        warn_of_twins(net)


class Averaged(Callback):
    """Keeps an average of the network, as user code does with the classes of torch and timm."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep

    def on_train_start(self, trainer, pl_module):
        self.average = torch.optim.swa_utils.AveragedModel(pl_module.model)
        self.cycle = self

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.average is not None:
            self.average.update_parameters(pl_module.model)

    def on_train_end(self, trainer, pl_module):
        if not self.keep:
            self.average = None


def test_a_copy_that_keeps_its_maps_is_told_of_and_the_advice_makes_it_ordinary():
    held = Averaged(keep=True)
    with pytest.warns(UserWarning, match=r"copy of the module \(of model\.0, for one\).*lightning_peft\.bake\(copy\)"):
        run = fit([NMSparsity("2:4", exclude=()), ToyScale()], after=[held], max_epochs=2)
    network = lightning_peft.bake(held.average.module)
    assert [type(part) for part in network.modules()] == [type(part) for part in run.module.model.modules()]
    assert network.state_dict().keys() == run.module.model.state_dict().keys()
    groups = network[0].weight.unflatten(1, (-1, 4))
    assert ((groups != 0).sum(-1) <= 2).all()


def test_copies_that_are_gone_or_followed_are_not_told_of():
    fit([ToyScale()], after=[Averaged(keep=False), EMAWeightAveraging(decay=0.5)], max_epochs=2)  # warnings are errors here
