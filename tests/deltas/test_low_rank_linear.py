"""The fused layer computes what the plain composition does: both orders of gradients, autocast, transforms, dropout."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, linear, silu
from torch.utils.checkpoint import checkpoint

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
    down, up = torch.ones(1, 2, requires_grad=True), torch.full((1, 1), 1e-3)
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


def gated(h: Tensor) -> Tensor:
    return silu(h) * h.sin()


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu, tanh": lambda h: gelu(h, approximate="tanh"),
    "silu": silu,
    "gated": gated,
}


def kept(make: Callable[[Tensor], Tensor], freeze: bool = False, dropout: bool = False) -> bool:
    """Whether the input of a layer, which nobody else holds, is there after the forward pass."""
    h, w, b, a, u, _ = tensors((6,), 4, 5, 2)
    inputs = make(h * 1)
    freed: list[bool] = []
    weakref.finalize(inputs.untyped_storage(), freed.append, True)
    dropped = inputs * 0.5 if dropout else None
    result = low_rank_linear(inputs, w.detach(), b.detach(), a.detach() if freeze else a, u, 0.5, dropped)
    del inputs
    assert result.requires_grad
    return not freed


@pytest.mark.parametrize("name", MADE)
def test_an_input_whose_operands_are_kept_anyway_is_not_kept(name: str) -> None:
    assert not kept(MADE[name])
    assert kept(torch.sin)


def test_nothing_of_an_input_is_kept_that_no_gradient_needs() -> None:
    assert not kept(torch.sin, freeze=True)
    assert not kept(torch.sin, dropout=True)


@pytest.mark.parametrize("name", MADE)
def test_gradients_through_an_input_that_is_made_again(name: str) -> None:
    h, w, b, a, u, _ = tensors((2, 3), 4, 5, 2)

    def function(h: Tensor, a: Tensor, u: Tensor) -> Tensor:
        return low_rank_linear(MADE[name](h), w.detach(), b.detach(), a, u, 0.5)

    theirs = torch.autograd.grad(composed(MADE[name](h), w, b, a, u, 0.5).square().sum(), (h, a, u))
    torch.testing.assert_close(torch.autograd.grad(function(h, a, u).square().sum(), (h, a, u)), theirs)
    assert torch.autograd.gradgradcheck(function, (h, a, u))


def test_an_input_that_is_made_again_in_blocks() -> None:
    h, w, b, a, u, _ = tensors((2, 75), 8192, 3, 2)
    made = low_rank_linear(MADE["gated"](h), w.detach(), b.detach(), a, u, 0.5)
    theirs = torch.autograd.grad(composed(MADE["gated"](h), w, b, a, u, 0.5).square().sum(), (h, a, u))
    torch.testing.assert_close(torch.autograd.grad(made.square().sum(), (h, a, u)), theirs)


def test_gradients_where_rows_are_frozen() -> None:
    x, w, b, a, u, _ = tensors((2, 3), 4, 5, 2)

    def function(x: Tensor, u: Tensor) -> Tensor:
        return low_rank_linear(x, w.detach(), b.detach(), a.detach(), u, 0.5)

    torch.testing.assert_close(function(x, u), composed(x, w, b, a, u, 0.5))
    assert torch.autograd.gradcheck(function, (x, u))
    assert torch.autograd.gradgradcheck(function, (x, u))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    h, w, b, a, u, _ = tensors((6,), 4, 5, 2)

    def block(h: Tensor) -> Tensor:
        return low_rank_linear(gelu(h), w.detach(), b.detach(), a, u, 0.5)

    expected = torch.autograd.grad(block(h).square().sum(), (h, a, u))
    checkpoint(block, h, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close((h.grad, a.grad, u.grad), expected)


def test_what_is_packed_elsewhere_stays_there() -> None:
    h, w, b, a, u, _ = tensors((6,), 4, 5, 2)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    def unpack(tensor: Tensor) -> Tensor:
        assert backward, "read in the forward pass"
        return tensor

    backward = False
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        inputs = gelu(h)
        result = low_rank_linear(inputs, w.detach(), b.detach(), a, u, 0.5)
    backward = True
    result.sum().backward()
    assert any(tensor is inputs or tensor.data_ptr() == inputs.data_ptr() for tensor in packed)


def test_an_input_of_a_graph_that_was_let_go_is_read_as_it_is() -> None:
    h, w, b, a, u, _ = tensors((6,), 4, 5, 2)
    inputs = gelu(h)
    inputs.sum().backward()
    torch.testing.assert_close(low_rank_linear(inputs, w.detach(), b, a, u, 0.5), composed(inputs, w, b, a, u, 0.5))


TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "vmap": lambda function, x: torch.func.vmap(function)(x),
    "grad": lambda function, x: torch.func.grad(lambda each: function(each).sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_functions(name: str) -> None:
    x, *others, _ = (each.detach() for each in tensors((3, 2), 4, 5, 2))
    ours, theirs = (TRANSFORMS[name](lambda each, f=f: f(each, *others, 0.5), x) for f in (low_rank_linear, composed))
    torch.testing.assert_close(ours, theirs)
