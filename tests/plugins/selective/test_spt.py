"""SPT: what is chosen within the budget, what is trained then, and that nothing is before."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import lightning_peft
from lightning_peft import SPT
from lightning_peft.functional import sensitive_entries
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft_plugins.selective._shared.roomy_values import RoomyValues
from lightning_peft_plugins.selective._spt.sensitive_values import SensitiveValues

RANKED = ("model.0.weight", "model.2.weight", "model.0.bias", "model.2.bias")


def chosen_by_hand(seen: dict[str, Tensor], budget: int, rank: int, ease: float) -> dict[str, set[int]]:
    """Take entry after entry, the most sensitive first, and stop before the budget is overrun."""
    entries = sorted(((-float(s), name, i) for name, each in seen.items() for i, s in enumerate(each.flatten())))
    chosen: dict[str, set[int]] = {name: set() for name in seen}

    def cost(name: str) -> int:
        count, shape = len(chosen[name]), seen[name].shape
        if len(shape) == 1:
            return shape[0] if count >= shape[0] / 5 else count
        return rank * sum(shape) if count >= rank * sum(shape) / ease else count

    for _, name, i in entries:
        chosen[name].add(i)
        if sum(map(cost, seen)) > budget:
            chosen[name].remove(i)
            return chosen
    return chosen


def spt_by_hand(task: Task, budget: int = 80, rank: int = 1, ease: float = 3.0) -> None:
    """Squared gradients of two batches, a choice, and dense leaves behind masks, or two factors."""
    module = task.module
    base = {name: module.get_parameter(name).detach().clone() for name in RANKED}

    def loss(weights: dict[str, Tensor], batch: Any) -> Tensor:
        return F.cross_entropy(functional_call(module, weights, (batch[0],)), batch[1])

    seen = {name: torch.zeros_like(each) for name, each in base.items()}
    for batch in task.batches[:2]:
        now = {name: each.clone().requires_grad_() for name, each in base.items()}
        gradients = torch.autograd.grad(loss(now, batch), list(now.values()))
        seen = {name: seen[name] + gradient**2 for name, gradient in zip(now, gradients, strict=True)}
    chosen = chosen_by_hand(seen, budget, rank, ease)
    gains: dict[str, Callable[[], Tensor]] = {}
    leaves: list[Tensor] = []
    for name, each in base.items():
        found = torch.tensor(sorted(chosen[name]), dtype=torch.long)
        if each.ndim == 2 and len(found) >= rank * sum(each.shape) / ease:
            drawn = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(f"spt/{name}".encode()))
            bound = 1 / math.sqrt(each.shape[1])
            down = ((torch.rand(rank, each.shape[1], generator=drawn) * 2 - 1) * bound).requires_grad_()
            up = torch.zeros(each.shape[0], rank, requires_grad=True)
            gains[name] = partial(torch.matmul, up, down)
            leaves += [down, up]
        else:
            whole = each.ndim == 1 and len(found) >= len(each) / 5
            mask = torch.ones(each.numel()) if whole else torch.zeros(each.numel()).index_fill_(0, found, 1)
            delta = torch.zeros_like(each, requires_grad=True)
            gains[name] = partial(torch.mul, delta, mask.view_as(each))
            leaves.append(delta)
    adam = torch.optim.Adam(leaves, lr=module.lr)
    for batch in task.batches[2:]:
        adam.zero_grad()
        loss({name: base[name] + gain() for name, gain in gains.items()}, batch).backward()
        adam.step()
    with torch.no_grad():
        for name, gain in gains.items():
            module.get_parameter(name).copy_(base[name] + gain())


class TestSPT(MethodTester):
    methods = [
        lambda: SPT(budget=80, rank=1, looks=2, ease=3.0, checkpoint="full"),
        lambda: SPT(budget=0.1, rank=2, looks=3, tune=("head", "bias"), targets="all-weights", exclude=(), checkpoint="full"),
    ]
    references = [Reference(spt_by_hand, tolerance=2e-5)]


@given(st.integers(1, 60), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_the_choice_is_that_of_taking_entry_after_entry(budget: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    seen = {"a": torch.rand(4, 6, generator=draw), "b": torch.rand(5, 5, generator=draw), "c": torch.rand(8, generator=draw)}
    whole = {"a": 10, "b": 10, "c": 8}
    found = sensitive_entries(seen, whole, {"a": 10 / 3, "b": 10 / 3, "c": 8 / 5}, budget)
    expected = chosen_by_hand(seen, budget, 1, 3.0)
    assert {name: set(each.tolist()) for name, each in found.items()} == expected


def test_entries_without_a_gradient_are_not_chosen() -> None:
    seen = {"a": torch.tensor([[0.0, 2.0], [0.0, 0.0]]), "b": torch.zeros(3)}
    found = sensitive_entries(seen, {"a": 4, "b": 3}, {"a": math.inf, "b": 1.0}, 100)
    assert [each.tolist() for each in found.values()] == [[1], []]


class Watch(Callback):
    """The module's weights and gradients of the first steps, and what was chosen in the end."""

    def __init__(self, method: SPT) -> None:
        self.method, self.weights, self.seen = method, list[dict[str, Tensor]](), dict[str, Tensor]()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        named = {name: pl_module.get_submodule(name.rpartition(".")[0]) for name in RANKED}
        self.weights.append({name: getattr(each, name.rpartition(".")[2]).detach().clone() for name, each in named.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.values = {mapped.name: values for mapped, values in self.method.sensitive(pl_module)}
        self.state = {name: len(trainer.optimizers[0].state.get(values.values, {})) for name, values in self.values.items()}


def test_nothing_moves_at_first_and_then_the_chosen_numbers_alone() -> None:
    method = SPT(budget=80, rank=1, looks=2, ease=3.0)
    watch = Watch(method)
    torch.manual_seed(0)
    module = Plain()
    batches = list(loader())
    leaves = [module.get_parameter(name) for name in RANKED]
    seen = {name: torch.zeros_like(each) for name, each in zip(RANKED, leaves, strict=True)}
    for inputs, labels in batches[:2]:
        for (name, total), gradient in zip(
            seen.items(), torch.autograd.grad(F.cross_entropy(module(inputs), labels), leaves), strict=True
        ):
            seen[name] = total + gradient**2
    expected = chosen_by_hand({name: each.detach() for name, each in seen.items()}, 80, 1, 3.0)
    run = fit([method], module=module, after=[watch], max_epochs=2)
    for name in RANKED:
        assert torch.equal(watch.weights[0][name], watch.weights[2][name]), f"{name} moved while gradients were added up"
    low_rank = {name for name, values in watch.values.items() if values.low_rank}
    whole = {name for name in RANKED if name.endswith("bias") and len(expected[name]) >= 16 / 5}
    assert low_rank == {name for name in RANKED if name.endswith("weight") and len(expected[name]) >= 32 / 3}
    assert low_rank
    assert whole
    for name, values in watch.values.items():
        if name not in low_rank | whole:
            assert set(values.indices.tolist()) == expected[name]
            moved = (run.module.get_parameter(name) != watch.weights[0][name]).flatten().nonzero().flatten()
            assert set(moved.tolist()) <= expected[name]
        if name in low_rank:
            assert not watch.state[name], "an optimizer keeps state for values where a LoRA stands"
    assert any(name not in low_rank | whole and expected[name] for name in RANKED), "no tensor has values at some entries"
    assert 0 < sum(values.tuned for values in watch.values.values()) <= 80


def test_steps_in_which_nothing_is_trained_are_clipped() -> None:
    fit([SPT(budget=80, looks=2)], gradient_clip_val=0.1, gradient_clip_algorithm="value")


class Pretrained(Plain):
    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            super().build()


def test_a_resume_while_gradients_are_added_up_chooses_the_same(tmp_path: Path) -> None:
    """Six steps of looking, files after four and eight."""

    def methods() -> list[Any]:
        return [SPT(budget=60, rank=1, looks=6, ease=3.0)]

    run = fit(methods(), style=Pretrained, after=[every_epoch(tmp_path)], max_epochs=3)
    for epoch in (0, 1):
        resumed = fit(methods(), style=Pretrained, resume=tmp_path / f"epoch={epoch}.ckpt", seed=4, max_epochs=3)
        assert_same(run, resumed, f"uninterrupted against resumed after epoch {epoch}")
    again = lightning_peft.load_from_checkpoint(Pretrained, tmp_path / "epoch=2.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(run.module.parameters(), again.parameters(), strict=True))


def test_an_average_follows_the_choice() -> None:
    class ByHand(Callback):
        average: Tensor | None = None

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            now = pl_module.model[2].weight.detach()
            self.average = now.clone() if self.average is None else 0.5 * self.average + 0.5 * now

    by_hand = ByHand()
    method = SPT(budget=100, rank=16, looks=2)  # values alone, whose averages add up with the weights
    run = fit([method], before=[EMAWeightAveraging(decay=0.5)], after=[by_hand], max_epochs=3)
    torch.testing.assert_close(run.module.model[2].weight.detach(), by_hand.average, rtol=0, atol=1e-5)


def states() -> Iterator[Any]:
    yield torch.tensor([0.0, 1.0])
    yield torch.arange(4)
    yield torch.tensor([1, 9])
    yield torch.tensor([2, 2])
    yield torch.tensor([-1])


def test_damaged_coordinates_are_refused() -> None:
    for values in (RoomyValues(6, 3), SensitiveValues(6, 3)):
        for state in states():
            with pytest.raises(ValueError, match="saved coordinates"):
                values.set_extra_state(state)
        values.set_extra_state(torch.tensor([1, 3]))
        values.values.data += 1
        assert values(torch.zeros(6)).tolist() == [0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget=0 must be above 0"),
        ({"rank": 0}, "rank=0"),
        ({"looks": 0}, "looks=0"),
        ({"ease": 0.5}, "must be at least 1"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        SPT(**arguments)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(MisconfigurationException, match=r"is not one. Give at least budget=0.0018"):
        fit([SPT(budget=0.001)])
    assert "at most 80 numbers for 544 entries of 4 tensors, trained from step 3" in str(
        lightning_peft.plan(Plain(), [SPT(budget=80, looks=2)])
    )
    with pytest.warns(UserWarning, match="before step 17, from which it trains"):
        trainer(callbacks=[SPT(budget=80)]).fit(Plain(), loader(), loader())
