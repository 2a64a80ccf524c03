"""A training goes on with its channels in another order as it would have without: weights, moments, averages, masks."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.structure.coupled.units import Coupled, UnitPlace
from lightning_peft.structure.reorder import group_orders, reordered_state
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit

ORDER = torch.randperm(8, generator=torch.Generator().manual_seed(3))
ORDERS = {"model.0.weight": {0: ORDER}, "model.0.bias": {0: ORDER}, "model.2.weight": {1: ORDER}}


class Eight(Plain):
    def build(self) -> None:
        self.model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


class Turn(Method):
    """Puts the hidden units of a small network into another order."""

    lane = Lane.STRUCTURE
    writes = frozenset({Resource.STRUCTURE})

    def __init__(self, at: int = 3) -> None:
        super().__init__()
        self.at = at

    def next_order(self, run: Run) -> Mapping[str, Mapping[int, Tensor]] | None:
        return ORDERS if run.step == self.at else None


def turned(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(values)
    for name, dims in ORDERS.items():
        for dim, order in dims.items():
            found[name] = found[name].index_select(dim, order)
    return found


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning")
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("averaged", [False, True])
def test_training_goes_on_as_it_would_have(optimizer: str, averaged: bool) -> None:
    def run(*methods: Method) -> dict[str, Tensor]:
        ema = [EMAWeightAveraging(decay=0.5)] if averaged else []
        return dict(fit(methods, style=Eight, optimizer=optimizer, after=ema, max_epochs=2).module.state_dict())

    wanted, found = turned(run()), run(Turn())
    assert list(wanted) == list(found)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def test_parameters_stay_the_objects_they_were_and_no_journal_is_kept() -> None:
    module = Eight()
    before = [*map(id, module.parameters())]
    done = fit([Turn()], style=Eight, module=module, max_epochs=1)
    assert [*map(id, module.parameters())] == before
    assert done.state()["lightning_peft"] is None


def test_a_unit_of_several_coordinates_moves_as_a_whole() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(6, 1))
    places = [UnitPlace("0.weight", 0, torch.arange(2)), UnitPlace("2.weight", 1, torch.tensor([0, 0, 0, 1, 1, 1]))]
    orders = group_orders(module, {"0": (Coupled("0", "channels", 2, places, []), torch.tensor([1, 0]))})
    assert orders["2.weight"][1].tolist() == [3, 4, 5, 0, 1, 2]


def test_optimizers_that_keep_lists_are_refused_before_anything_changes() -> None:
    with pytest.raises(MisconfigurationException, match=r"list 'old_dirs' for weight.*one state for each parameter"):
        reordered_state({"step": torch.tensor(1.0), "old_dirs": [torch.ones(4)]}, [2, 2], {0: torch.tensor([1, 0])}, "weight")
