"""Gradients a sample and Jacobians, which a user's step takes by `torch.func`, through the library's own functions."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap

from lightning_peft.functional import compand
from lightning_peft.weights.hard_mask import hard_mask
from lightning_peft.weights.nm_prune import ste_prune

torch.manual_seed(3)
WEIGHT, INPUTS = torch.randn(5, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
MASK = WEIGHT.abs() > 0.5
A, B = torch.tensor(2.0, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
FUNCTIONS = {
    "ste": lambda w: ste_prune(w, MASK),
    "sr-ste": lambda w: ste_prune(w, MASK, sr_lambda=0.1),
    "decay": lambda w: ste_prune(w, MASK, 0.3, masked_grad=True),
    "decay of a tensor": lambda w: ste_prune(w, MASK, torch.tensor(0.3), masked_grad=True),
    "hard": lambda w: hard_mask(w, MASK),
    "regrow": lambda w: hard_mask(w, MASK, regrow=True),
    "compand": lambda w: compand(w, A, B),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_a_sample_are_those_of_a_loop(name):
    def loss(weight, x):
        return (x @ FUNCTIONS[name](weight).t()).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(WEIGHT, INPUTS)
    for x, gradient in zip(INPUTS, found, strict=True):
        weight = WEIGHT.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(weight, x), weight)
        assert torch.allclose(gradient, expected, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # of torch's own rules for jvp
@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacobians_by_the_input(name):
    weight = FUNCTIONS[name](WEIGHT)
    assert torch.allclose(jacrev(lambda x: FUNCTIONS[name](WEIGHT) @ x)(INPUTS[0]), weight, atol=1e-12)
    ahead = jvp(lambda x: FUNCTIONS[name](WEIGHT) @ x, (INPUTS[0],), (INPUTS[1],))[1]
    assert torch.allclose(ahead, weight @ INPUTS[1], atol=1e-12)
