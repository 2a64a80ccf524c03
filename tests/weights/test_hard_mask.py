"""A mask applied as a factor: what where() gives, and its gradient."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.weights.hard_mask import hard_mask, mask_factor
from lightning_peft.weights.held import HeldMask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_factor_does_what_where_does(dtype: torch.dtype, regrow: bool, layout: str) -> None:
    weight = torch.randn(6, 10, dtype=dtype)
    weight[0, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
    weight = weight.t() if layout == "transposed" else weight
    mask = torch.rand(weight.shape) > 0.5
    mask[..., 0] = False
    mask |= ~weight.isfinite()  # what is pruned must be finite
    grad = torch.randn(weight.shape, dtype=dtype)
    leaf = weight.clone().requires_grad_()
    out = hard_mask(leaf, mask, mask_factor(mask, dtype), regrow=regrow)
    out.backward(grad)
    assert torch.equal(out.nan_to_num(), torch.where(mask, weight, 0.0).nan_to_num())
    assert torch.equal(leaf.grad, grad if regrow else torch.where(mask, grad, 0.0))
    plain = weight.clone().requires_grad_()
    hard_mask(plain, mask, regrow=regrow).backward(grad)
    assert torch.equal(plain.grad, leaf.grad)


def test_a_factor_follows_the_mask_and_the_type_and_outlives_validation() -> None:
    held = HeldMask()
    weight = torch.ones(4, requires_grad=True)
    held.hold(torch.tensor([True, False, True, False]))
    with torch.inference_mode():
        assert held.factor(weight).tolist() == [1, 0, 1, 0]
    hard_mask(weight, held.held, held.factor(weight)).sum().backward()
    assert weight.grad.tolist() == [1, 0, 1, 0]
    held.hold(torch.tensor([False, True, True, False]))
    assert held.factor(weight).tolist() == [0, 1, 1, 0]
    assert held.factor(weight.half()).dtype is torch.float16
    assert held.factor(weight).tolist() == [0, 1, 1, 0]
    held.set_extra_state(torch.tensor([True, True, False, False]))
    assert held.factor(weight).tolist() == [1, 1, 0, 0]
