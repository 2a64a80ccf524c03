from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as S

from lightning_peft.optim.optimizers import (
    move_to_group,
    named_groups,
    owner,
    parameter_names,
    place_parameters,
)

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 2)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.a.parameters())}, {"params": list(self.b.parameters()), "lr": 0.05}]


class Custom(S.LRScheduler):
    """A user's scheduler with per-group lists of its own, and one list that only looks like one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.floors = [0.01 * (i + 1) for i, _ in enumerate(optimizer.param_groups)]
        self.milestones = [2, 4]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        rate = 0.5 ** sum(self.last_epoch >= m for m in self.milestones)
        return [max(base * rate, floor) for base, floor in zip(self.base_lrs, self.floors, strict=True)]


def sequential(o: Optimizer) -> S.LRScheduler:
    return S.SequentialLR(o, [S.LinearLR(o, total_iters=2), S.LambdaLR(o, lambda e: 0.8**e)], [2])


SCHEDULERS = {
    "lambda": lambda o: S.LambdaLR(o, [lambda e: 0.9**e, lambda e: 1 / (e + 1)]),
    "multiplicative": lambda o: S.MultiplicativeLR(o, lambda e: 0.9),
    "step": lambda o: S.StepLR(o, 2),
    "multistep": lambda o: S.MultiStepLR(o, [2, 5]),
    "constant": lambda o: S.ConstantLR(o, 0.3, 3),
    "linear": lambda o: S.LinearLR(o, total_iters=5),
    "polynomial": lambda o: S.PolynomialLR(o, 8, 2.0),
    "exponential": lambda o: S.ExponentialLR(o, 0.9),
    "cosine": lambda o: S.CosineAnnealingLR(o, 8),
    "restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "onecycle": lambda o: S.OneCycleLR(o, [0.1, 0.3], total_steps=12),
    "onecycle-scalar": lambda o: S.OneCycleLR(o, 0.1, total_steps=12, cycle_momentum=False),
    "cyclic": lambda o: S.CyclicLR(o, [0.01, 0.02], [0.1, 0.2], step_size_up=3, cycle_momentum=True),
    "cyclic-plain": lambda o: S.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "plateau": lambda o: S.ReduceLROnPlateau(o, patience=0, factor=0.5, min_lr=[0.001, 0.02]),
    "plateau-scalar": lambda o: S.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "sequential": sequential,
    "nested": lambda o: S.ChainedScheduler([sequential(o), S.ExponentialLR(o, 0.9)]),
    "chained": lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.1, 2), S.ExponentialLR(o, 0.9)]),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=4),
    "custom": Custom,
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, initial_accumulator_value=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.1, momentum=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), capturable=False, foreach=False, weight_decay=0.1),
}


def train_step(net: nn.Module, optimizer: Optimizer, scheduler: Any = None, seed: int = 0) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net.b(net.a(x).tanh()).square().sum().backward()
    optimizer.step()
    if isinstance(scheduler, S.ReduceLROnPlateau):
        scheduler.step(1.0)
    elif scheduler is not None:
        scheduler.step()


def settings(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "weight_decay")}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("before", [0, 3])
def test_moved_parameters_follow_the_sibling_under_every_scheduler(name: str, before: int) -> None:
    net, plain = Net(), Net()
    optimizer, reference = (OPTIMIZERS["sgd"](n.groups()) for n in (net, plain))
    scheduler, reference_scheduler = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)
    for step in range(before):
        train_step(net, optimizer, scheduler, step)
        train_step(plain, reference, reference_scheduler, step)
    move_to_group(optimizer, [net.b.bias], [scheduler], weight_decay=0.0)
    assert named_groups(net, optimizer) == [["a.weight", "a.bias"], ["b.weight"], ["b.bias"]]
    for step in range(before, 8):
        assert settings(optimizer.param_groups[2]) == settings(optimizer.param_groups[1])
        assert [settings(g) for g in optimizer.param_groups[:2]] == [settings(g) for g in reference.param_groups]
        train_step(net, optimizer, scheduler, step)
        train_step(plain, reference, reference_scheduler, step)
    assert len(scheduler.get_last_lr()) == 3
    assert scheduler.get_last_lr()[2] == scheduler.get_last_lr()[1]


def test_the_bare_way_really_fails() -> None:
    net = Net()
    optimizer = OPTIMIZERS["sgd"](net.a.parameters())
    scheduler = S.LambdaLR(optimizer, lambda e: 1.0)
    optimizer.add_param_group({"params": list(net.b.parameters())})
    train_step(net, optimizer)
    with pytest.raises(ValueError, match="zip"):
        scheduler.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_move_without_a_difference_in_effect_changes_no_weight(name: str) -> None:
    """Same decay in the new group, so weights must stay bit-equal to an optimizer nobody touched: state is kept."""
    net, plain = Net(), Net()
    optimizer, reference = OPTIMIZERS[name](net.parameters()), OPTIMIZERS[name](plain.parameters())
    key = "weight_decay" if name != "rprop" else "maximize"
    for step in range(6):
        if step == 3:
            original = optimizer.param_groups[0][key]
            move_to_group(optimizer, [net.a.bias, net.b.weight], **{key: 0.0 if key == "weight_decay" else True})
            assert [len(g["params"]) for g in optimizer.param_groups] == [2, 2]
            optimizer.param_groups[1][key] = original
        train_step(net, optimizer, seed=step)
        train_step(plain, reference, seed=step)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_parameters_join_and_train(name: str) -> None:
    net = Net()
    optimizer = OPTIMIZERS[name](net.a.parameters())
    scheduler = S.StepLR(optimizer, 2)
    train_step(net, optimizer, scheduler)
    move_to_group(optimizer, [net.b.weight], [scheduler])
    move_to_group(optimizer, [net.b.bias], [scheduler], weight_decay=0.0)
    expected = [["a.weight", "a.bias", "b.weight"], ["b.bias"]]
    assert named_groups(net, optimizer) == (expected if name != "rprop" else [expected[0] + expected[1]])
    before = copy.deepcopy(net.b.state_dict())
    train_step(net, optimizer, scheduler)
    assert all((before[k] != v).any() for k, v in net.b.state_dict().items())


@pytest.mark.parametrize("scheduler_name", SCHEDULERS)
@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_state_dict_round_trip_is_bit_exact(scheduler_name: str, optimizer_name: str) -> None:
    def build() -> tuple[Net, Optimizer, Any]:
        net = Net()
        optimizer = OPTIMIZERS[optimizer_name](net.groups())
        return net, optimizer, SCHEDULERS[scheduler_name](optimizer)

    def move(net: Net, optimizer: Optimizer, scheduler: Any) -> None:
        move_to_group(optimizer, [net.a.bias, net.b.bias], [scheduler], weight_decay=0.0)

    one = build()
    move(*one)
    for step in range(3):
        train_step(*one, seed=step)
    saved = copy.deepcopy([part.state_dict() for part in one])
    two = build()
    move(*two)
    for part, state in zip(two, saved, strict=True):
        part.load_state_dict(state)
    for step in range(3, 8):
        train_step(*one, seed=step)
        train_step(*two, seed=step)
    for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    assert [settings(g) for g in one[1].param_groups] == [settings(g) for g in two[1].param_groups]


def test_a_matching_group_is_used_again_and_repeating_changes_nothing() -> None:
    net = Net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    scheduler = SCHEDULERS["nested"](optimizer)
    for _ in range(2):
        for parameter in (net.a.bias, net.b.bias):
            move_to_group(optimizer, [parameter], [scheduler], weight_decay=0.0)
    assert named_groups(net, optimizer) == [["a.weight", "b.weight"], ["a.bias", "b.bias"]]
    assert len(scheduler._schedulers[0]._schedulers[1].lr_lambdas) == 2


def test_equal_groups_of_the_user_are_left_alone() -> None:
    net = Net()
    optimizer = torch.optim.SGD([{"params": [net.a.weight]}, {"params": [net.b.weight]}], lr=0.1)
    move_to_group(optimizer, [net.b.weight], weight_decay=0.0)
    assert named_groups(net, optimizer) == [["a.weight"], ["b.weight"]]


def test_groups_that_only_schedulers_tell_apart_do_not_match() -> None:
    net = Net()
    optimizer = torch.optim.SGD([{"params": [net.a.weight], "weight_decay": 0.1}, {"params": [net.b.weight]}], lr=0.1)
    scheduler = S.LambdaLR(optimizer, [lambda e: 0.9**e, lambda e: 1.0])
    move_to_group(optimizer, [net.a.bias], [scheduler], like=0, weight_decay=0)
    assert named_groups(net, optimizer) == [["a.weight"], ["b.weight"], ["a.bias"]]


@pytest.mark.parametrize("name", ["lambda", "cosine", "onecycle", "cyclic", "plateau", "nested", "polynomial"])
def test_lr_scale_holds_at_every_step(name: str) -> None:
    net = Net()
    optimizer = OPTIMIZERS["sgd"](net.groups())
    scheduler = SCHEDULERS[name](optimizer)
    train_step(net, optimizer, scheduler)
    move_to_group(optimizer, [net.b.bias], [scheduler], lr_scale=16.0)
    for step in range(6):
        assert optimizer.param_groups[2]["lr"] == pytest.approx(16 * optimizer.param_groups[1]["lr"], rel=1e-9)
        train_step(net, optimizer, scheduler, step)


def test_schedulers_of_other_optimizers_and_configurations_of_lightning() -> None:
    from lightning.pytorch.utilities.types import LRSchedulerConfig

    net = Net()
    first, second = (OPTIMIZERS["sgd"](m.parameters()) for m in (net.a, net.b))
    schedulers = [LRSchedulerConfig(S.LambdaLR(o, lambda e: 0.5)) for o in (first, second)]
    move_to_group(first, [net.a.bias], schedulers, weight_decay=0.0)
    assert [len(c.scheduler.base_lrs) for c in schedulers] == [2, 1]


def test_tensor_learning_rates_are_not_shared_between_groups() -> None:
    net = Net()
    optimizer = OPTIMIZERS["tensor-lr"](net.parameters())
    scheduler = S.StepLR(optimizer, 1)
    move_to_group(optimizer, [net.a.bias], [scheduler], weight_decay=0.0)
    optimizer.param_groups[1]["lr"].fill_(7.0)
    scheduler.base_lrs[1].fill_(7.0)
    assert optimizer.param_groups[0]["lr"] == scheduler.base_lrs[0] == torch.tensor(0.1)


def test_a_scheduler_that_refers_to_itself() -> None:
    net = Net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    scheduler = S.StepLR(optimizer, 1)
    scheduler.after_scheduler = scheduler  # as warm-up wrappers keep the one that follows
    move_to_group(optimizer, [net.a.bias], [scheduler], weight_decay=0.0)
    assert scheduler.base_lrs == [0.1, 0.1]


def test_named_optimizers_keep_names_beside_parameters() -> None:
    net, extra = Net(), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.1)
    move_to_group(optimizer, [net.a.bias], weight_decay=0.0)
    move_to_group(optimizer, {"extra": extra}, like=1)
    assert [g["param_names"] for g in optimizer.param_groups] == [["a.weight", "b.weight", "b.bias"], ["a.bias", "extra"]]
    with pytest.raises(MisconfigurationException, match="name: parameter"):
        move_to_group(optimizer, [nn.Parameter(torch.zeros(1))], like=0)


def test_an_emptied_group_is_kept_and_steps() -> None:
    net = Net()
    for name in ("sgd", "fused", "adamw", "rmsprop"):
        optimizer = OPTIMIZERS[name](net.groups())
        move_to_group(optimizer, net.b.parameters(), weight_decay=0.0)
        assert [len(g["params"]) for g in optimizer.param_groups] == [2, 0, 2]
        train_step(net, optimizer)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight_deacy": 0.0}, "weight_decay"),
        ({"lr": 0.5}, "lr_scale"),
        ({"momentum": 0.5}, "cycle_momentum=False"),
        ({"like": 7}, "groups 0 to 1"),
    ],
)
def test_wrong_requests_change_nothing(kwargs: dict[str, Any], message: str) -> None:
    net = Net()
    optimizer = OPTIMIZERS["sgd"](net.groups())
    scheduler = SCHEDULERS["onecycle"](optimizer)
    with pytest.raises(MisconfigurationException, match=message):
        move_to_group(optimizer, [net.a.bias], [scheduler], **kwargs)
    assert named_groups(net, optimizer) == [["a.weight", "a.bias"], ["b.weight", "b.bias"]]


def test_a_new_parameter_with_several_groups_needs_like_and_lbfgs_is_refused() -> None:
    net = Net()
    with pytest.raises(MisconfigurationException, match="like=0 to like=1"):
        move_to_group(OPTIMIZERS["sgd"](net.groups()), [nn.Parameter(torch.zeros(1))])
    only = torch.optim.LBFGS(net.parameters())
    with pytest.raises(MisconfigurationException, match=r"no parameters can have a value of lr of their own.*\(lr_scale=1\)"):
        move_to_group(only, [net.a.bias], lr_scale=2.0)
    move_to_group(only, [net.a.bias], lr_scale=1)
    assert len(only.param_groups) == 1


def test_names_and_owners() -> None:
    net = Net()
    net.b.weight = nn.Parameter(torch.zeros(2, 3))
    net.tied = net.a
    assert list(parameter_names(net).values()) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    first, second = OPTIMIZERS["sgd"](net.a.parameters()), OPTIMIZERS["sgd"]([{"params": [net.b.bias]}])
    assert owner([first, second], net.b.bias) == (1, 0)
    assert owner([first, second], net.b.weight) is None
    net.a.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(MisconfigurationException, match=r"group 0, position 0.*\(3, 3\)"):
        named_groups(net, first)


def test_place_parameters_follows_the_weight_they_belong_to() -> None:
    net, scale = Net(), nn.Parameter(torch.ones(1))
    first, second = OPTIMIZERS["sgd"](net.a.parameters()), OPTIMIZERS["adamw"](net.b.parameters())
    scheduler = S.LambdaLR(second, lambda e: 0.5)
    for _ in range(2):
        place_parameters([first, second], [scheduler], [scale], net.b.weight, {"weight_decay": 0.0})
    assert owner([first, second], scale) == (1, 1)
    assert len(scheduler.base_lrs) == 2
    place_parameters([first, second], [scheduler], [net.a.bias], net.b.weight, {"weight_decay": 0.0})
    assert owner([first, second], net.a.bias) == (0, 1)  # stays with the optimizer the user gave it
    loose = nn.Parameter(torch.ones(1))
    place_parameters([first, second], [scheduler], [loose], nn.Parameter(torch.ones(1)), {"weight_decay": 0.0})
    assert owner([first, second], loose) is None
