"""SaRA: that small entries alone move, the penalty on their rank, and what is frozen when it is selected anew."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import lightning_peft
from lightning_peft import SaRA
from lightning_peft.functional import nuclear_norm
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft_plugins.selective._sara.small_values import SmallValues

WEIGHTS = ("model.0.weight", "model.2.weight")


def sara_by_hand(task: Task, threshold: float = 0.06, nuclear: float = 0.05, reselect: int = 5) -> None:
    """Whole weights behind masks; the gradient of the nuclear norm by the eigenvectors of ``P^T P``; two optimizers."""
    module = task.module
    weights = {name: module.get_parameter(name).detach().clone().requires_grad_() for name in WEIGHTS}
    masks = {name: each.detach().abs() < threshold for name, each in weights.items()}
    adam = torch.optim.Adam(weights.values(), lr=module.lr)
    for step, batch in enumerate(task.batches):
        if step == reselect:
            masks = {name: mask & (weights[name].detach().abs() < threshold) for name, mask in masks.items()}
            adam = torch.optim.Adam(weights.values(), lr=module.lr)
        adam.zero_grad()
        F.cross_entropy(functional_call(module, weights, (batch[0],)), batch[1]).backward()
        drawn = WEIGHTS[zlib.crc32(f"0/{step}".encode()) % 2]
        part = (weights[drawn].detach() * masks[drawn]).double()
        squares, right = torch.linalg.eigh(part.T @ part)
        inverse = torch.where(squares > 1e-12, squares, torch.inf).rsqrt()
        weights[drawn].grad += (nuclear * part @ right * inverse @ right.T).float()
        for name, each in weights.items():
            each.grad *= masks[name]
        adam.step()
    with torch.no_grad():
        for name, each in weights.items():
            module.get_parameter(name).copy_(each)


class TestSaRA(MethodTester):
    methods = [
        lambda: SaRA(threshold=0.06, nuclear=0.05, reselect=5, checkpoint="full"),
        lambda: SaRA(0.2, 0.0, None, tune=("head", "bias"), targets="all-weights", exclude=(), checkpoint="full"),
    ]
    references = [Reference(sara_by_hand, tolerance=5e-5)]


class Pretrained(Plain):
    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            super().build()


class Steps(Callback):
    """The second weight after every step, and how many steps Adam has taken with its values."""

    def __init__(self, method: SaRA) -> None:
        self.method, self.weights, self.ages, self.active = method, list[Tensor](), list[int](), list[int]()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        [values] = [values for mapped, values in self.method.maps(pl_module) if mapped.name == "model.2.weight"]
        state = trainer.optimizers[0].state.get(values.values, {})
        self.weights.append(pl_module.model[2].weight.detach().flatten().clone())
        self.ages.append(int(state.get("step", 0)))
        self.active.append(len(values.indices))


def test_the_norm_is_that_of_the_trained_entries() -> None:
    """Of [[3, 9], [9, 4]] the diagonal alone: singular values 3 and 4; of a row (3, 4) its length."""
    weight = torch.tensor([[3.0, 9.0], [9.0, 4.0]])
    values = torch.zeros(2, requires_grad=True)
    torch.testing.assert_close(nuclear_norm(weight, torch.tensor([0, 3]), values), torch.tensor(7.0))
    row = nuclear_norm(torch.tensor([[3.0, 4.0], [9.0, 9.0]]), torch.tensor([0, 1]), values)
    torch.testing.assert_close(row, torch.tensor(5.0))
    torch.testing.assert_close(torch.autograd.grad(row, values)[0], torch.tensor([0.6, 0.8]))


def test_small_entries_alone_move_and_begin_with_their_sign() -> None:
    still = fit([SaRA(threshold=0.06, reselect=None)], module=Pretrained("sgd", lr=0.0), optimizer="sgd").module
    assert all(torch.equal(p, q) for p, q in zip(still.parameters(), Pretrained().parameters(), strict=True))
    before = Pretrained().model[2].weight.detach()
    after = fit([SaRA(threshold=0.06, reselect=None)], module=Pretrained(), max_epochs=2).module.model[2].weight.detach()
    changed, small = after != before, before.abs() < 0.06
    assert not (changed & ~small).any()
    assert changed.sum() > small.sum() / 2


def test_what_has_grown_is_frozen_where_it_is() -> None:
    method = SaRA(threshold=0.06, nuclear=0.0, reselect=4)
    steps = Steps(method)
    fit([method], module=Pretrained(), after=[steps], max_epochs=3)
    first = Pretrained().model[2].weight.detach().flatten().abs() < 0.06
    grown = first & (steps.weights[3].abs() >= 0.06)
    assert grown.any()
    assert steps.active[2:5] == [int(first.sum())] + 2 * [int((first & ~grown).sum())]
    assert torch.equal(steps.weights[11][grown], steps.weights[3][grown])
    assert (steps.weights[11] != steps.weights[3])[first & ~grown].any()
    assert steps.ages == [1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_files_hold_the_values_and_resume(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [SaRA(threshold=0.06, reselect=6)]

    run = fit(methods(), style=Pretrained, after=[every_epoch(tmp_path)], max_epochs=3)
    for epoch in (0, 1):
        resumed = fit(methods(), style=Pretrained, resume=tmp_path / f"epoch={epoch}.ckpt", seed=4, max_epochs=3)
        assert_same(run, resumed, f"uninterrupted against resumed after epoch {epoch}")
    again = lightning_peft.load_from_checkpoint(Pretrained, tmp_path / "epoch=2.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(run.module.parameters(), again.parameters(), strict=True))


def test_values_take_the_number_of_a_file_and_no_more_than_there_are_entries() -> None:
    values = SmallValues(6, 2, torch.tensor([0, 5]))
    values.load_state_dict({"values": torch.ones(3), "_extra_state": torch.tensor([1, 2, 4])})
    assert values(torch.zeros(6)).tolist() == [0, 1, 1, 0, 1, 0]
    for wrong in (torch.ones(7), torch.ones(1, 3)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            values.load_state_dict({"values": wrong, "_extra_state": torch.tensor([1])})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"threshold": 0.0}, "threshold=0.0 must be above 0"), ({"nuclear": -1.0}, "would raise the rank")],
    ids=str,
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        SaRA(**arguments)


def test_a_threshold_below_all_entries_names_one_that_is_not() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"no entry of its 2 weights .* A tenth of them is below threshold=0.02"
    ):
        fit([SaRA(threshold=1e-9)])
    with pytest.warns(UserWarning, match="before entries were selected anew, after step 9; reselect=None"):
        trainer(callbacks=[SaRA(threshold=0.06, reselect=9)]).fit(Plain(), loader(), loader())
