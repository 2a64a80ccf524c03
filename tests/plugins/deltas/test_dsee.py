"""DSEE: where its values stand, and its training in plain torch."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import lightning_peft
from lightning_peft import DSEE, MagnitudePruning
from lightning_peft.deltas.layout import Layout
from lightning_peft.functional import sparse_support
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft_plugins.deltas.dsee import SparseLowRankForm

WEIGHTS = ("model.0.weight", "model.2.weight")


def places_by_numpy(weight: Tensor, count: int, drawn: Tensor, most: int) -> list[int]:
    """GreBsmo with projections in place of bases: the product is the part of a matrix in the span of a few columns."""
    matrix = weight.double().numpy()
    right = drawn.double().numpy()
    while True:
        sparse = np.zeros_like(matrix)
        for _ in range(2):
            columns = (matrix - sparse) @ right.T
            right = np.linalg.pinv(columns) @ (matrix - sparse)
            rest = matrix - columns @ right
            sparse = np.where(np.abs(rest) < 0.01, 0, rest)
        if len(right) + 5 > most:
            return sorted(np.argsort(-np.abs(rest).ravel())[:count].tolist())
        right = np.concatenate([right, np.linalg.qr(rest - sparse)[1][:5]])


def dsee_by_hand(task: Task) -> None:
    module, rank, count = task.module, 2, 9
    frozen = {name: module.get_parameter(name).detach().clone() for name in WEIGHTS}
    leaves: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    masks: dict[str, Tensor] = {}
    for name, weight in frozen.items():
        draw = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(f"dsee/{name}".encode()))
        bound = 1 / math.sqrt(weight.shape[1])
        down = (torch.rand(rank, weight.shape[1], generator=draw) * 2 - 1) * bound
        up, dense = torch.zeros(weight.shape[0], rank), torch.zeros_like(weight)
        leaves[name] = (down.requires_grad_(), up.requires_grad_(), dense.requires_grad_())
        masks[name] = torch.zeros(weight.numel())
        masks[name][places_by_numpy(weight, count, torch.randn(1, weight.shape[1], generator=draw), 10)] = 1
    adam = torch.optim.Adam([each for three in leaves.values() for each in three], lr=module.lr)

    def weights() -> dict[str, Tensor]:
        return {
            name: frozen[name] + 3 / rank * up @ down + dense * masks[name].view_as(dense)
            for name, (down, up, dense) in leaves.items()
        }

    for inputs, labels in task.batches:
        adam.zero_grad()
        F.cross_entropy(functional_call(module, weights(), (inputs,)), labels).backward()
        adam.step()
    with torch.no_grad():
        for name, value in weights().items():
            module.get_parameter(name).copy_(value)


class Small(Plain):
    """Weights about the threshold, below which they are noise: a matrix of few such entries has no one decomposition."""

    def build(self) -> None:
        super().build()
        with torch.no_grad():
            for place in (0, 2):
                self.model[place].weight.mul_(0.1)


class TestDSEE(MethodTester):
    methods = [lambda: DSEE(2, 3, 9, checkpoint="full")]
    references = [Reference(dsee_by_hand, style=Small, tolerance=2e-5)]


def test_entries_that_were_planted_are_found() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.outer(1 + torch.rand(40, generator=draw), 1 + torch.rand(30, generator=draw))
    planted = torch.randperm(weight.numel(), generator=draw)[:12].sort().values
    weight.view(-1)[planted] += 1.0
    assert torch.equal(sparse_support(weight, 12, draw, rounds=1), planted)


def test_matrices_of_a_stack_have_places_of_their_own() -> None:
    draw = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 8, 6, generator=draw)
    form = SparseLowRankForm(Layout(stack.shape, stacked=True), 1, sparse=4)
    form.find_support(stack, torch.Generator().manual_seed(1))
    assert len({tuple(each) for each in form.indices.tolist()}) == 3
    form.values.data = torch.arange(1.0, 13.0).view(3, 4)
    for matrix, places, values in zip(form.delta(), form.indices, form.values, strict=True):
        assert matrix.flatten()[places].tolist() == values.tolist()
        assert matrix.count_nonzero() == 4
    small = SparseLowRankForm(Layout(torch.Size([2, 3])), 1, sparse=100)
    small.find_support(torch.randn(2, 3, generator=draw), draw)
    assert small.indices.tolist() == list(range(6))


def test_beside_pruning_the_zeros_stay() -> None:
    run = fit([DSEE(2, sparse=9), MagnitudePruning(0.5, exclude=())], max_epochs=2)
    weights = [run.module.model[place].weight for place in (0, 2, 4)]
    assert sum(int((each == 0).sum()) for each in weights) >= sum(each.numel() for each in weights) // 2
    assert "rank 2 on 2 tensors, 146 parameters" in str(lightning_peft.plan(Plain(), [DSEE(2, sparse=9)]))


def test_damaged_places_are_refused() -> None:
    form = SparseLowRankForm(Layout(torch.Size([2, 3])), 1, sparse=2)
    for state in (torch.tensor([0.0, 1.0]), torch.tensor([1]), *map(torch.tensor, ([2, 6], [-1, 2], [3, 3]))):
        with pytest.raises(ValueError, match="saved places"):
            form.set_extra_state(state)
    form.set_extra_state(torch.tensor([1, 5]))
    assert form.indices.tolist() == [1, 5]
