from __future__ import annotations

import math

import torch

from lightning_peft.cli.loading import run_lines

LINES = ("import torch", "net = torch.nn.BatchNorm1d(2)")
STATE = torch.nn.BatchNorm1d(2).state_dict()


def test_lines_that_give_the_network() -> None:
    state = torch.get_rng_state()
    assert run_lines((*LINES, "print('noise')", "torch.randn(3)"), STATE) == ""
    assert torch.equal(torch.get_rng_state(), state)


def test_not_a_number_is_the_same_where_both_are() -> None:
    broken = STATE | {"weight": torch.tensor([1.0, math.nan])}
    assert run_lines((*LINES, "net.weight.data[1] = torch.nan"), broken) == ""
    assert run_lines(LINES, broken) == "other values are loaded: weight"


def test_lines_that_give_something_else_are_told_why() -> None:
    assert run_lines((*LINES, "net.weight.data[0] = 2"), STATE) == "other values are loaded: weight"
    assert run_lines((*LINES, "net.weight.data = torch.ones(1)"), STATE) == "other values are loaded: weight"
    assert run_lines(("import torch", "net = torch.nn.BatchNorm1d(2, affine=False)"), STATE).startswith(
        "other tensors are loaded"
    )
    assert run_lines((*LINES, "net.register_buffer('more', torch.ones(1))"), STATE) == "other tensors are loaded: more"
    assert run_lines((*LINES, "raise KeyError('gone')"), STATE) == "KeyError: 'gone'"
    assert run_lines(("raise ValueError",), STATE) == "ValueError: "
