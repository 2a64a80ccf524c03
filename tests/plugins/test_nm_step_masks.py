"""Masks of small weights that are chosen together are the ones that each weight would have chosen alone."""

from __future__ import annotations

import copy

import pytest
import torch
from test_nm_sparsity import Net, fit
from torch import nn

from lightning_peft import NMSparsity
from lightning_peft.weights.nm import nm_mask, nm_masks
from lightning_peft_plugins.sparsity._nm_sparsity import step_masks
from lightning_peft_plugins.sparsity._nm_sparsity.nm_map import MaskRule, NMMap
from lightning_peft_plugins.sparsity._nm_sparsity.step_masks import StepMasks

CHOSEN = "lightning_peft_plugins.sparsity._nm_sparsity.step_masks.nm_masks"


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def ask(masks: StepMasks, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
    masks.begin()
    return [masks.take(parameter, 2, 4, parameter.ndim - 1) for parameter in parameters]


def taught(*shapes: tuple[int, ...]) -> tuple[StepMasks, list[nn.Parameter]]:
    masks, parameters = StepMasks(), weights(*shapes)
    assert ask(masks, parameters) == [None] * len(parameters), "nobody knows yet what will be asked for"
    return masks, parameters


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (3, 5), (4, 4)])
def test_one_pass_makes_the_masks_of_single_ones(n: int, m: int) -> None:
    found = weights((8, 16), (6, 10, 3, 3), (16, 4), (3,), (5, 24))
    strided = torch.randn(8, 24).t()
    dims = [1, 1, 0, 0, -1, 1]
    for weight, dim, mask in zip([*found, strided], dims, nm_masks([*found, strided], n, m, dims), strict=True):
        alone = nm_mask(weight, n, m, dim)
        assert torch.equal(mask, alone)
        assert mask.stride() == alone.stride()


@pytest.mark.parametrize("recipe", ["sr-ste", "mdgf-exponential", "sdgf-stepwise"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_training_is_the_same(recipe: str, accumulated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    for together in (step_masks.TOGETHER, 0):
        monkeypatch.setattr(step_masks, "TOGETHER", together)
        torch.manual_seed(0)
        module = Net()
        fit(module, NMSparsity("2:4", recipe=recipe), accumulate_grad_batches=accumulated)
        left.append(module.state_dict())
    assert all(torch.equal(left[0][name], left[1][name]) for name in left[0])


def test_layers_of_a_pattern_share_one_choice_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(CHOSEN, lambda weights, *args: calls.append(len(weights)) or nm_masks(weights, *args))
    fit(Net(), NMSparsity("2:4", recipe="sr-ste", exclude=["first", "head"]), accumulate_grad_batches=2)
    assert calls == [2] * 11, "of twelve batches, in all but the first"


def test_a_weight_that_was_changed_chooses_alone() -> None:
    masks, (first, second) = taught((4, 8), (4, 8))
    masks.begin()
    assert masks.take(first, 2, 4, 1) is not None
    with torch.no_grad():
        second.neg_().add_(3.0)
    assert masks.take(second, 2, 4, 1) is None
    first.data.mul_(torch.randn(4, 8))  # which leaves its version as it was
    assert masks.take(first, 2, 4, 1) is None, "a mask is handed out once: the step may be evaluated again"


def test_what_changed_between_batches_is_seen() -> None:
    masks, (first, second) = taught((4, 8), (8, 8))
    masks.begin()
    for weight in (first, second):
        weight.data.copy_(torch.randn_like(weight))
    assert torch.equal(masks.take(first, 2, 4, 1), nm_mask(first, 2, 4)), "chosen when the first is asked for, no sooner"
    second.data.copy_(torch.randn_like(second))
    masks.begin()
    assert masks.take(second, 2, 4, 1) is None, "and what was left over is forgotten"


def test_large_weights_are_left_alone_and_others_come_in_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_masks, "TOGETHER", 64)
    masks, parameters = taught((4, 8), (4, 8), (4, 8), (4, 8), (16, 8), (8, 8))
    calls = []
    monkeypatch.setattr(CHOSEN, lambda weights, *args: calls.append(len(weights)) or nm_masks(weights, *args))
    found = ask(masks, parameters)
    assert calls == [2, 2]
    assert [mask is None for mask in found] == [False] * 4 + [True] * 2, "one is too large, one would be alone"


def test_other_types_are_chosen_apart() -> None:
    masks, parameters = taught((4, 8), (4, 8), (4, 8))
    parameters[1].data = parameters[1].data.double()
    for parameter, mask in zip(parameters, ask(masks, parameters), strict=True):
        assert torch.equal(mask, nm_mask(parameter, 2, 4))


def test_a_copy_asks_for_its_own_masks() -> None:
    rule = MaskRule(2, 4)
    rule.set(2, 4, 0.0)
    maps, parameters = [NMMap(2, 4, 1, rule=rule) for _ in range(2)], weights((4, 8), (4, 8))
    for _ in range(2):
        rule.together.begin()
        maps[0](parameters[0])
        maps[1](parameters[1])
    twin, theirs = copy.deepcopy((maps[0], parameters[0]))
    theirs.data.copy_(torch.randn(4, 8))
    assert torch.equal(twin(theirs) != 0, nm_mask(theirs, 2, 4))
    assert twin.rule.together is not rule.together


def test_passes_that_train_nothing_take_no_mask() -> None:
    rule = MaskRule(2, 4)
    rule.set(2, 4, 0.0)
    nm_map, (weight, other) = NMMap(2, 4, 1, rule=rule), weights((4, 8), (4, 8))
    with torch.no_grad():
        nm_map(weight)
    torch.func.grad(lambda value: nm_map(value).sum())(weight.detach())
    nm_map(weight.detach())
    nm_map(weight * 2.0)  # what a map below has made of it
    assert not rule.together._asked
    nm_map(weight)
    nm_map(other)
    assert len(rule.together._asked) == 2
