"""LIFT: which weights are principal, that they alone are trained, and what a new choice keeps."""

from __future__ import annotations

import re
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

import lightning_peft
from lightning_peft import LIFT, NMSparsity, WeightCompander
from lightning_peft.functional import is_nm, principal_weights
from lightning_peft.structure.checkpoint import KEY
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.weights.sparse_values import SparseValues


def mask_of(weight: Tensor, rank: int, filter_rank: int) -> Tensor:
    """Largest entries of the nearest matrix of a low rank, by the eigenvectors of ``W W^T``."""
    vectors = torch.linalg.eigh(weight @ weight.T).eigenvectors[:, -filter_rank:]
    reduced = (vectors @ (vectors.T @ weight)).abs()
    count = min(rank * sum(weight.shape), weight.numel())
    return reduced >= reduced.flatten().sort(descending=True).values[count - 1]


@torch.no_grad()
def sparse_adam_by_hand(task: Task) -> None:
    """Dense moments under a mask, one clock for all, chosen again after every fifth step: the paper's algorithm."""
    module = task.module
    weights = [module.model[0].weight, module.model[2].weight]
    moments: list[tuple[Tensor, Tensor]] = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    masks = [mask_of(w, 2, 2) for w in weights]
    for step, batch in enumerate(task.batches, start=1):
        with torch.enable_grad():
            gradients = torch.autograd.grad(task.loss(batch), weights)
        for weight, gradient, (first, second), mask in zip(weights, gradients, moments, masks, strict=True):
            first.copy_(torch.where(mask, 0.9 * first + 0.1 * gradient, 0))
            second.copy_(torch.where(mask, 0.999 * second + 0.001 * gradient**2, 0))
            size = (second / (1 - 0.999**step)).sqrt() + 1e-8
            weight -= torch.where(mask, module.lr * first / (1 - 0.9**step) / size, 0)
        if step % 5 == 0:
            masks = [mask_of(w, 2, 2) for w in weights]


class TestLIFT(MethodTester):
    methods = [
        lambda: LIFT(rank=2, filter_rank=2, every=5, checkpoint="full"),
        lambda: LIFT(rank=1, every=None, tune=("head", "bias"), targets="all-weights", exclude=(), checkpoint="full"),
    ]
    references = [Reference(sparse_adam_by_hand, tolerance=2e-5)]


def test_the_largest_entry_and_the_principal_one_differ() -> None:
    """A lone 5 beside a block of fours: the block has the singular value 8, so at rank 1 its entries are principal."""
    weight = torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 5.0]])
    assert principal_weights(weight, 4, 1).tolist() == [0, 1, 3, 4]
    assert principal_weights(weight, 1, 3).tolist() == [8]
    assert principal_weights(weight.view(3, 3, 1, 1), 4, 1).tolist() == [0, 1, 3, 4]


@given(st.integers(2, 6), st.integers(2, 6), st.integers(1, 3), st.integers(0, 500))
@settings(deadline=None)
def test_of_a_matrix_of_low_rank_the_largest_entries_are_principal(rows: int, columns: int, rank: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((rows, rank), (rank, columns)))
    count = max(1, rows * columns // 3)
    found = principal_weights(left @ right, count, rank)
    expected = (left @ right).abs().flatten().topk(count).indices.sort().values
    assert found.tolist() == expected.tolist()
    transposed = principal_weights((left @ right).T, count, rank)
    assert {divmod(int(i), columns) for i in found} == {divmod(int(i), rows)[::-1] for i in transposed}


class Kept(Callback):
    """The optimizer's tensors of every coordinate, and the coordinates."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        states = trainer.optimizers[0].state.values()
        self.bytes = sum(
            state[key].numel() * state[key].element_size() for state in states for key in ("exp_avg", "exp_avg_sq")
        )
        self.numbers = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)


def test_only_the_chosen_weights_move_and_only_they_cost_state() -> None:
    torch.manual_seed(0)
    module = Plain()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    kept = Kept()
    fit([LIFT(rank=2, filter_rank=2, every=None)], module=module, after=[kept], max_epochs=2)
    for name, value in module.state_dict().items():
        changed = value != before[name]
        if name in ("model.0.weight", "model.2.weight"):
            mask = mask_of(before[name], 2, 2)
            assert mask.sum() == 2 * (16 + 16)
            assert not (changed & ~mask).any()
            assert changed.sum() > 48, "units without a gradient are few"
        else:
            assert not changed.any(), name
    assert kept.numbers == 2 * 64
    assert kept.bytes == 2 * 4 * 2 * 64
    full = Kept()
    fit([], after=[full])
    assert full.bytes == 2 * 4 * sum(p.numel() for p in module.parameters())


def test_a_new_choice_keeps_what_was_learnt_and_the_state_of_what_stays() -> None:
    values = SparseValues(6, torch.tensor([1, 2, 4]))
    values.values.data = torch.tensor([1.0, 2.0, 4.0])
    weight = torch.zeros(2, 3)
    assert values(weight).tolist() == [[0, 1, 2], [0, 4, 0]]
    values.move(torch.tensor([0, 2, 5]))
    assert values(weight).tolist() == [[0, 0, 2], [0, 0, 0]]

    class Steps(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            [values] = [each for mapped, each in method.maps(pl_module) if mapped.name == "model.2.weight"]
            state = trainer.optimizers[0].state[values.values]
            self.seen.append((values.indices, pl_module.model[2].weight.detach().clone(), state["exp_avg"].clone()))

        def __init__(self) -> None:
            self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    method, steps = LIFT(rank=2, filter_rank=2, every=4), Steps()
    fit([method], after=[steps], optimizer="adam", max_epochs=3)
    moved = [place for place in range(11) if not torch.equal(steps.seen[place][0], steps.seen[place + 1][0])]
    assert set(moved) <= {2, 6, 10}
    assert moved, "no new choice differed"
    place = moved[0]
    (old, weight, _), (new, later, moments) = steps.seen[place], steps.seen[place + 1]
    still = [int(i) for i in old if i not in new]
    assert (later != weight).flatten()[still].any(), "what was learnt in the last step before is lost"
    grown = [position for position, i in enumerate(new) if i not in old]
    assert not moments[grown].any()
    assert moments[[position for position, i in enumerate(new) if i in old]].any()
    after = steps.seen[place + 2][1].flatten() if place + 2 < len(steps.seen) else later.flatten()
    assert torch.equal(after[still], later.flatten()[still])


def test_an_average_is_that_of_the_weights_whatever_was_chosen() -> None:
    """The average of values and stored weights is the average of their sums, over every new choice."""

    class ByHand(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            now = pl_module.model[2].weight.detach()
            self.average = now.clone() if self.average is None else 0.5 * self.average + 0.5 * now

        average: Tensor | None = None

    by_hand = ByHand()
    averaging = EMAWeightAveraging(decay=0.5)
    run = fit([LIFT(rank=1, filter_rank=2, every=3)], before=[averaging], after=[by_hand], max_epochs=3)
    torch.testing.assert_close(run.module.model[2].weight.detach(), by_hand.average, rtol=0, atol=1e-5)


def test_files_hold_the_values_and_what_a_new_choice_changed(tmp_path: Path) -> None:
    class Pretrained(Plain):
        def build(self) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(7)
                super().build()

    def methods(every: int | None) -> list[Any]:
        return [LIFT(rank=1, filter_rank=2, every=every)]

    for every, base in ((None, 6), (6, 4)):
        run = fit(methods(every), style=Pretrained, after=[every_epoch(tmp_path)], max_epochs=2)
        saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
        assert len(saved[KEY]["base"]) == base
        again = lightning_peft.load_from_checkpoint(Pretrained, tmp_path / "epoch=1.ckpt")
        assert all(torch.equal(p, q) for p, q in zip(run.module.parameters(), again.parameters(), strict=True))
        resumed = fit(methods(every), style=Pretrained, resume=tmp_path / "epoch=0.ckpt", seed=4, max_epochs=2)
        assert_same(run, resumed, "uninterrupted against resumed")
        for file in tmp_path.glob("*.ckpt"):
            file.unlink()


def test_a_mask_acts_around_the_values() -> None:
    run = fit([LIFT(rank=2, every=4), NMSparsity("2:4", "one-shot", exclude=())], max_epochs=2)
    assert is_nm(run.module.model[2].weight, 2, 4)


def test_a_compander_below_lets_what_was_learnt_into_the_weight() -> None:
    method, seen = LIFT(rank=2, every=None), list[Tensor]()

    class Choice(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            assert method.run is not None
            seen.append(pl_module.model[2].weight.detach().clone())
            method.move(method.run, {"model.2.weight": torch.arange(64)}, fold=True)
            seen.append(pl_module.model[2].weight.detach().clone())

    fit([method, WeightCompander(targets=["model.2"])], after=[Choice()], max_epochs=3)
    torch.testing.assert_close(*seen, rtol=0, atol=1e-6)


def test_damaged_coordinates_are_refused() -> None:
    values = SparseValues(4, 2)
    for state in (
        torch.tensor([0.0, 1.0]),
        torch.tensor([0]),
        torch.tensor([1, 4]),
        torch.tensor([-1, 2]),
        torch.tensor([2, 2]),
    ):
        with pytest.raises(ValueError, match="saved coordinates"):
            values.set_extra_state(state)
    values.set_extra_state(torch.tensor([1, 3]))
    assert values(torch.zeros(4)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("arguments", "message"), [({"rank": 0}, "at least 1"), ({"filter_rank": 0}, "at least 1")], ids=str)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        LIFT(**arguments)


def test_a_choice_that_never_came_is_told() -> None:
    with pytest.raises(MisconfigurationException, match="every=0 is no length"):
        LIFT(every=0)
    with pytest.warns(UserWarning, match="before principal weights were found anew, first after step 400; every=None asks"):
        trainer(callbacks=[LIFT(rank=1)]).fit(Plain(), loader(), loader())
    trainer(callbacks=[LIFT(rank=1, every=None)]).fit(Plain(), loader(), loader())
    assert "128 of 512 weights in 2 layers" in str(lightning_peft.plan(Plain(), [LIFT(rank=2)]))
