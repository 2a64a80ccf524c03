"""Ranks and intruders against hand arithmetic, torch's own decomposition and PEFT's search for intruders."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor, nn

from lightning_peft.measure.spectra import (
    effective_rank,
    intruder_dimensions,
    left_vectors,
    singular_values,
    stable_rank,
)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (1, 4)])
def test_the_decomposition_is_that_of_torch(shape) -> None:
    u, sigma, _ = torch.linalg.svd(matrix(*shape).double(), full_matrices=False)
    assert torch.allclose(singular_values(matrix(*shape)), sigma)
    assert torch.allclose((left_vectors(matrix(*shape)).T @ u).abs(), torch.eye(len(sigma)).double(), atol=1e-9)


def test_ranks_by_hand() -> None:
    values = torch.tensor([2.0, 1.0, 1.0])  # shares 1/2, 1/4, 1/4: an entropy of 1.5 bits
    assert effective_rank(values) == pytest.approx(2**1.5)
    assert stable_rank(values) == pytest.approx(1.5)
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert stable_rank(torch.ones(7)) == 7
    assert effective_rank(torch.zeros(3)) == stable_rank(torch.zeros(3)) == 0
    assert effective_rank(torch.tensor([5.0, 0.0])) == stable_rank(torch.tensor([5.0, 0.0])) == 1


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=8).filter(lambda values: max(values) > 1e-3), st.floats(0.01, 100))
def test_neither_rank_leaves_its_bounds_or_sees_the_scale(values, scale) -> None:
    sigma = torch.tensor(values, dtype=torch.float64)
    rank = int((sigma > 0).sum())
    assert 1 - 1e-9 <= stable_rank(sigma) <= rank + 1e-9
    assert 1 - 1e-9 <= effective_rank(sigma) <= rank + 1e-6
    assert effective_rank(scale * sigma) == pytest.approx(effective_rank(sigma))
    assert stable_rank(scale * sigma) == pytest.approx(stable_rank(sigma))


def test_a_direction_that_was_not_there_is_the_one_intruder() -> None:
    before = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0]))
    change = torch.zeros(5, 5)
    change[4, 3] = 9.0  # from an input that was ignored to an output that was silent
    assert intruder_dimensions(before, before + change) == 1
    assert intruder_dimensions(before, before + change / 10) == 1  # last among the four, still among the first ten
    assert intruder_dimensions(before, before + change / 10, top=3) == 0
    tall = torch.cat([torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(1, 3)])
    grown = tall.clone()
    grown[3, 0] = 10.0  # the first vector is (3, 0, 0, 10) / 10.44 now: a cosine of 0.287
    assert intruder_dimensions(tall, grown) == 1
    assert intruder_dimensions(tall, grown, threshold=0.28) == 0


def test_no_change_and_a_change_along_what_was_there_bring_none() -> None:
    for before in (torch.eye(6), matrix(6, 9), matrix(9, 6), torch.zeros(4, 4)):
        assert intruder_dimensions(before, before.clone()) == 0
    before = torch.diag(torch.arange(16.0, 0, -1))
    assert intruder_dimensions(before, 3 * before) == 0
    assert intruder_dimensions(before, -before) == 0
    spike = before.clone()
    spike[0, 0] += 30
    assert intruder_dimensions(before, spike) == 0


def test_a_spike_across_all_directions_is_one_intruder() -> None:
    # The first vector of diag(16, ..., 1) + 30 uu' has no cosine above 0.3194 to the axes, the next ones 0.899 and 0.8211.
    before, ones = torch.diag(torch.arange(16.0, 0, -1)), torch.ones(16, 1) / 4
    after = before + 30 * ones @ ones.T
    assert intruder_dimensions(before, after) == 1
    assert intruder_dimensions(before, after, threshold=0.319) == 0
    assert intruder_dimensions(before, after, threshold=0.32) == 1


def test_of_a_weight_that_was_zero_everything_is_new() -> None:
    assert intruder_dimensions(torch.zeros(4, 6), torch.outer(torch.ones(4), torch.ones(6))) == 1
    assert intruder_dimensions(torch.eye(4), torch.zeros(4, 4)) == 0


@given(st.integers(0, 10_000))
def test_a_rotation_of_outputs_changes_nothing(seed) -> None:
    before, after = (
        matrix(8, 12, seed),
        matrix(8, 12, seed) + 3 * torch.outer(matrix(8, 1, seed + 1)[:, 0], matrix(12, 1, 7)[:, 0]),
    )
    turn = torch.linalg.qr(matrix(8, 8, seed + 2).double()).Q
    assert intruder_dimensions(turn @ before.double(), turn @ after.double()) == intruder_dimensions(before, after)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square, self.wide, self.tall = nn.Linear(24, 24), nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.tall(self.wide(self.square(x)))


@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
def test_intruders_are_those_that_peft_finds(size) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["square", "wide", "tall"], init_lora_weights=False)
    model = peft.get_peft_model(Layers(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn_like(parameter))
    weights = {
        name: (layer.get_base_layer().weight.detach(), layer.get_delta_weight("default").detach())
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    said: list[str] = []
    reduce_intruder_dimension(model, logging_sink=said.append)
    found = [line.split(": ") for line in said if "ntruders" in line]
    theirs = {name: 0 if what == "No intruders" else int(count[0]) for name, what, *count in found}
    ours = {name: intruder_dimensions(weight, weight + delta) for name, (weight, delta) in weights.items()}
    assert ours == theirs
    assert any(ours.values()) == (size > 0.1)


def test_the_entropy_is_natural_and_of_shares_not_of_squares() -> None:
    values = torch.tensor([3.0, 1.0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(values) == pytest.approx(math.exp(entropy))
