"""The fused layer computes what the plain composition does: both orders of gradients, autocast, transforms, dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from lightning_peft.deltas.low_rank_linear import low_rank_linear

sizes = st.integers(1, 7)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def tensors(lead: tuple[int, ...], inputs: int, outputs: int, rank: int, **settings: Any) -> list[Tensor]:
    shapes = [(*lead, inputs), (outputs, inputs), (outputs,), (rank, inputs), (outputs, rank), (*lead, inputs)]
    return [drawn(*shape, seed=seed, **settings) for seed, shape in enumerate(shapes)]


def composed(
    x: Tensor, w: Tensor, b: Tensor | None, a: Tensor, u: Tensor, scale: float, dropped: Tensor | None = None
) -> Tensor:
    """By the definition, in separate steps."""
    return linear(x, w, b) + scale * linear(linear(x if dropped is None else dropped, a), u)


@given(st.lists(sizes, min_size=1, max_size=3), sizes, sizes, sizes, st.floats(-2, 2), st.booleans())
def test_forward_and_backward(lead: list[int], inputs: int, outputs: int, rank: int, scale: float, drops: bool) -> None:
    found = []
    for function in (low_rank_linear, composed):
        *args, dropped = tensors(tuple(lead), inputs, outputs, rank)
        result = function(*args, scale, dropped if drops else None)
        leaves = [*args, dropped] if drops else args
        found.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("rows", [(2, 3), (4, 4)], ids=["few", "many"])
def test_gradients_of_first_and_second_order(rows: tuple[int, int], drops: bool) -> None:
    *args, dropped = tensors(rows, 4, 5, 2)
    given = [*args, dropped] if drops else args

    def function(*each: Tensor) -> Tensor:
        return low_rank_linear(*each[:5], 0.5, *each[5:])

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_what_is_frozen_gets_no_gradient() -> None:
    x, w, b, a, u, _ = tensors((3,), 4, 5, 2)
    low_rank_linear(x.detach(), w.detach(), b.detach(), a, u, 1.0).sum().backward()
    assert a.grad is not None
    assert u.grad is not None
    assert w.grad is b.grad is None


def test_a_small_delta_is_not_lost_among_many_rows_in_half_precision() -> None:
    x, weight = torch.ones(64, 2).bfloat16(), torch.tensor([[1.0, -1.0]]).bfloat16()
    down, up = torch.ones(1, 2), torch.full((1, 1), 1e-3)
    torch.testing.assert_close(
        low_rank_linear(x, weight, None, down, up, 1.0).float(), torch.full((64, 1), 2e-3), rtol=0.01, atol=0
    )


def test_autocast_computes_in_its_type() -> None:
    args = tensors((6,), 8, 8, 2, dtype=torch.float32)[:5]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, plain = low_rank_linear(*args, 0.5), composed(*args, 0.5)
    assert result.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(result, plain, atol=0.05, rtol=0.05)
    result.float().sum().backward()
    assert {each.grad.dtype for each in args if each.grad is not None} == {torch.float32}


def test_factors_in_single_precision_beside_a_layer_in_half() -> None:
    x, w, b = (each.detach().bfloat16() for each in tensors((6,), 8, 8, 2)[:3])
    a, u = (each.detach().float().requires_grad_() for each in tensors((6,), 8, 8, 2)[3:5])
    result = low_rank_linear(x, w, b, a, u, 0.5)
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.float32


TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "vmap": lambda function, x: torch.func.vmap(function)(x),
    "grad": lambda function, x: torch.func.grad(lambda each: function(each).sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_functions(name: str) -> None:
    x, *others, _ = (each.detach() for each in tensors((3, 2), 4, 5, 2))
    ours, theirs = (TRANSFORMS[name](lambda each, f=f: f(each, *others, 0.5), x) for f in (low_rank_linear, composed))
    torch.testing.assert_close(ours, theirs)
