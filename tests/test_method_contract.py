"""The toys and the methods of the first page through the tests every method must pass, and the ranks that those start."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_start_method

import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_peft import NMSparsity, WeightCompander
from lightning_peft.testing import AdaptationTester, MethodTester, Reference, Task, run_ddp
from lightning_peft.testing.toys import (
    ToyCentring,
    ToyEntropy,
    ToyLookahead,
    ToyLowRank,
    ToyNoise,
    ToySAM,
    ToyScale,
    ToyShift,
    ToyThreshold,
)


class TestToyScale(MethodTester):
    methods = [ToyScale, lambda: ToyScale(0.5, exclude="head")]


class TestToyThreshold(MethodTester):
    methods = [ToyThreshold]


class TestToyShift(MethodTester):
    methods = [ToyShift]


class TestToyLowRank(MethodTester):
    methods = [ToyLowRank, lambda: ToyLowRank(rank=1, exclude="head")]


class TestToyEntropy(MethodTester):
    methods = [ToyEntropy]
    no_stream = "The training dataset is iterable, so its samples have no index"


class TestToyNoise(MethodTester):
    methods = [ToyNoise]


def sam(task: Task, radius: float) -> None:
    """Foret et al., algorithm 1: take the gradient where the loss is highest near the weights."""
    parameters = list(task.module.parameters())
    for batch in task.batches:
        uphill = torch.autograd.grad(task.loss(batch), parameters)
        length = torch.cat([gradient.flatten() for gradient in uphill]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, uphill, strict=True):
                parameter += radius * gradient / length
        there = torch.autograd.grad(task.loss(batch), parameters)
        with torch.no_grad():
            for parameter, gradient, climbed in zip(parameters, there, uphill, strict=True):
                parameter -= radius * climbed / length
                parameter.grad = gradient
        task.optimizer.step()


class TestToySAM(MethodTester):
    methods = [lambda: ToySAM(0.1)]
    references = [Reference(partial(sam, radius=0.1), optimizer="sgd")]
    no_styles = dict.fromkeys(("Manual", "TwoOptimizers"), "by hand it needs a closure, which these do not give")


def lookahead(task: Task) -> None:
    """Zhang et al., algorithm 1, with 3 fast steps and a slow step of half the way."""
    slow = [parameter.detach().clone() for parameter in task.module.parameters()]
    for step, batch in enumerate(task.batches, start=1):
        task.step(task.loss(batch))
        if step % 3 == 0:
            for kept, fast in zip(slow, task.module.parameters(), strict=True):
                kept += 0.5 * (fast.detach() - kept)
                fast.data.copy_(kept)


class TestToyLookahead(MethodTester):
    methods = [ToyLookahead]
    references = [Reference(lookahead), Reference(lookahead, optimizer="sgd")]


class TestToyCentring(AdaptationTester):
    methods = [ToyCentring]


def sr_ste(task: Task, decay: float) -> None:
    """Zhou et al., equation 9: forward with the two largest of four, gradient straight through plus a decay of the others."""
    weights = [parameter for parameter in task.module.parameters() if parameter.ndim > 1]

    def masks() -> list[torch.Tensor]:
        groups = [weight.detach().abs().unflatten(1, (-1, 4)) for weight in weights]
        largest = [torch.zeros_like(group).scatter(-1, group.topk(2).indices, 1.0) for group in groups]
        return [mask.flatten(1) for mask in largest]

    for batch in task.batches:
        dense, kept = [weight.detach().clone() for weight in weights], masks()
        for weight, mask in zip(weights, kept, strict=True):
            weight.data.mul_(mask)
        task.optimizer.zero_grad()
        task.loss(batch).backward()
        for weight, stored, mask in zip(weights, dense, kept, strict=True):
            weight.data.copy_(stored)
            weight.grad += decay * (1 - mask) * stored
        task.optimizer.step()
    for weight, mask in zip(weights, masks(), strict=True):
        weight.data.mul_(mask)


class TestNMSparsity(MethodTester):
    every_one_sharded = True
    methods = [
        lambda: NMSparsity("2:4", exclude=()),
        lambda: NMSparsity("1:4", recipe="one-shot", targets="all-weights", exclude=(), dense="25%"),
        lambda: NMSparsity("2:4", recipe="sdgf-stepwise", targets="all-weights", exclude=(), refresh=2),
    ]
    references = [
        Reference(partial(sr_ste, decay=decay), partial(NMSparsity, recipe="sr-ste", sr_lambda=decay, exclude=()))
        for decay in (0.0, 0.05)
    ]
    no_exact_bake = "a soft or wider mask is in force until the last step; baking applies the target pattern"


def companded(task: Task, learnable: bool, a: float = 0.5, b: float = 1.0) -> None:
    """Cakaj et al., equation 1, w = a arctan(v / b), with one pair a and b a layer that is learned as it is, or one for all."""
    stored, scales = {}, {}
    for name, weight in task.module.named_parameters():
        if weight.ndim > 1:
            scales[name] = [torch.nn.Parameter(torch.tensor(value), requires_grad=learnable) for value in (a, b)]
            stored[name] = weight
            weight.data = b * torch.tan(weight.data / a)
    if learnable:
        task.optimizer.add_param_group({"params": [scale for pair in scales.values() for scale in pair]})
    train_companded(task, stored, lambda name, v: scales[name][0] * torch.atan(v / scales[name][1]))


def companded_as_fitted(task: Task) -> None:
    """The init of the card that is ours: the bound twice the largest weight, log a in steps of 1/16, b = a, logs learned."""
    stored, scales = {}, {}
    for name, weight in task.module.named_parameters():
        if weight.ndim > 1:
            start = math.ceil(16 * math.log(2 * 2 * float(weight.detach().abs().max()) / math.pi)) / 16
            log_a, log_b = (torch.nn.Parameter(torch.tensor(start)) for _ in "ab")
            task.optimizer.add_param_group({"params": [log_a, log_b]})
            stored[name], scales[name] = weight, (log_a, log_b)
            weight.data = math.exp(start) * torch.tan(weight.data / math.exp(start))
    train_companded(task, stored, lambda name, v: scales[name][0].exp() * torch.atan(v / scales[name][1].exp()))


def train_companded(task: Task, stored: dict[str, torch.Tensor], weight_of: Callable[..., torch.Tensor]) -> None:
    for inputs, labels in task.batches:
        weights = {name: weight_of(name, v) for name, v in stored.items()}
        task.step(torch.nn.functional.cross_entropy(torch.func.functional_call(task.module, weights, (inputs,)), labels))
    for name, v in stored.items():
        v.data = weight_of(name, v).detach()


class TestWeightCompander(MethodTester):
    every_one_sharded = True
    references = [
        *(Reference(partial(companded, learnable=True), optimizer=optimizer) for optimizer in ("adam", "sgd")),
        Reference(partial(companded, learnable=False, a=1.0, b=0.6), lambda: WeightCompander(preset="resnet18/cifar10")),
        Reference(companded_as_fitted, lambda: WeightCompander(init="fitted")),
    ]
    methods = [
        WeightCompander,
        lambda: WeightCompander(preset="resnet50/imagenet"),
        lambda: WeightCompander(init="fitted", headroom=1.2, slope=4.0, learnable=False),
    ]


def failing():
    raise ValueError("on purpose")


def hanging():
    time.sleep(600)


def told() -> list[object]:
    return [rank_zero_only.rank, os.environ["RANK"], os.getpgrp() == os.getpid(), get_start_method()]


def test_a_rank_knows_that_it_is_one():
    usual = get_start_method()
    assert run_ddp(f"{__file__}:told") == [[0, "0", True, usual], [1, "1", True, usual]]


def test_a_failing_rank_is_reported_with_its_output():
    with pytest.raises(RuntimeError, match=r"(?s)failing failed in 2 processes.*ValueError: on purpose"):
        run_ddp(f"{__file__}:failing")


def test_hanging_ranks_are_ended():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"time limit 3 s"):
        run_ddp(f"{__file__}:hanging", timeout=3)
    assert time.monotonic() - start < 60
