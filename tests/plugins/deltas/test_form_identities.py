"""Identities of the papers, each found by another route than the form's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lightning_peft
from lightning_peft.deltas.layout import Layout
from lightning_peft_plugins.deltas._shared.orthogonality import orthogonality
from lightning_peft_plugins.deltas.bone import BlockForm
from lightning_peft_plugins.deltas.nola import BasisForm
from lightning_peft_plugins.deltas.phm import HypercomplexForm
from lightning_peft_plugins.deltas.randlora import ScaledBasesForm
from lightning_peft_plugins.deltas.soka import KroneckerForm, rearranged

SIZES = st.integers(1, 4)


def drawn(form: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    form.double()
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return form


@given(outputs=SIZES, inputs=SIZES, rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_weight_of_bone_leads_back_to_the_frozen_one(outputs: int, inputs: int, rank: int, seed: int) -> None:
    form = drawn(BlockForm(Layout(torch.Size([outputs * rank, inputs * rank])), rank), seed)
    weight = torch.randn(outputs * rank, inputs * rank, dtype=torch.float64)
    after = form.of(weight)
    for row in range(outputs):
        block = form.blocks[row]
        for column in range(inputs):
            place = (slice(row * rank, (row + 1) * rank), slice(column * rank, (column + 1) * rank))
            back = (after[place] - block) @ torch.linalg.inv(torch.eye(rank, dtype=torch.float64) + block)
            torch.testing.assert_close(back, weight[place], atol=1e-6, rtol=1e-6)


@given(outputs=SIZES, inputs=SIZES, terms=st.integers(1, 3), rank=st.integers(1, 2))
def test_phm_is_a_sum_of_kronecker_products(outputs: int, inputs: int, terms: int, rank: int) -> None:
    form = drawn(HypercomplexForm(Layout(torch.Size([outputs * terms, inputs * terms])), rank, terms))
    summed = sum(torch.kron(form.squares[i], form.up[i] @ form.down[i]) for i in range(terms))
    torch.testing.assert_close(form.delta(), summed)


@given(a=SIZES, b=SIZES, c=SIZES, d=SIZES)
def test_a_kronecker_product_is_rearranged_to_an_outer_one(a: int, b: int, c: int, d: int) -> None:
    left, right = torch.randn(a, b), torch.randn(c, d)
    torch.testing.assert_close(rearranged(torch.kron(left, right), a, b), torch.outer(left.flatten(), right.flatten()))


def test_all_terms_of_soka_are_the_weight() -> None:
    weight = torch.randn(4, 6, dtype=torch.float64)
    form = KroneckerForm(Layout(weight.shape), 4).double()
    form.reset(weight, torch.Generator())
    whole = sum(torch.kron(a, b) for a, b in zip(form.outer, form.inner, strict=True))
    torch.testing.assert_close(whole, weight)
    sizes = form.outer.flatten(1).norm(dim=1) * form.inner.flatten(1).norm(dim=1)
    torch.testing.assert_close(sizes.square().sum(), weight.square().sum())


def test_nola_adds_up_its_bases_and_draws_them_from_the_seed() -> None:
    form = drawn(BasisForm(Layout(torch.Size([4, 6])), 2, scale=1.5, bases=5, seed=3))
    up = sum(form.of_up[i] * form.up[i] for i in range(5))
    down = form.first + sum(form.of_down[i] * form.down[i] for i in range(5))
    torch.testing.assert_close(form.delta(), 1.5 * up @ down)
    again, other = (BasisForm(Layout(torch.Size([4, 6])), 2, bases=5, seed=seed) for seed in (3, 4))
    assert torch.equal(again.down.double(), form.down)
    assert not torch.equal(again.down, other.down)
    assert float(form.down.abs().max()) <= 1 / 5**0.5
    assert not {"down", "up", "first"} & form.state_dict().keys()


def test_nola_learns_of_the_second_factor_first() -> None:
    form = BasisForm(Layout(torch.Size([4, 6])), 2, bases=5)
    form.delta().square().add(form.delta()).sum().backward()
    assert form.of_down.grad.abs().max() == 0 < form.of_up.grad.abs().max()


def test_randlora_has_full_rank_after_a_step() -> None:
    for shape in ([7, 12], [12, 7], [8, 8]):
        form = drawn(ScaledBasesForm(Layout(torch.Size(shape)), 3, seed=1))
        assert torch.linalg.matrix_rank(form.delta()) == min(shape)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_kasa_leaves_a_weight_of_smaller_rank(rank: int) -> None:
    class Holder(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(9, 6).double()

    module = Holder()
    first = torch.linalg.svdvals(module.layer.weight)
    method = lightning_peft.KaSA(rank, targets=["layer"], exclude=None)
    method.attach(module)
    ((_, form),) = method.forms(module)
    assert form.values.abs().max() > 0 == form.up.abs().max()
    seen = torch.linalg.svdvals(form.on_weight(module.layer.weight))
    torch.testing.assert_close(seen[:-rank], first[:-rank])
    assert seen[-rank:].max() < 1e-10


def gap(rows: Tensor) -> float:
    return float(orthogonality(rows))


def test_orthogonality_by_hand() -> None:
    assert gap(torch.eye(3, 5)) == 0
    assert gap(torch.zeros(4, 5)) == pytest.approx(2)  # the root of four
    assert gap(torch.tensor([[1.0, 1.0]])) == pytest.approx(1)  # 2 - 1
    rows = torch.eye(2, 3, requires_grad=True)
    orthogonality(rows).backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


def test_pissa_trains_what_the_weight_has_most_of() -> None:
    weight = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    layer = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight)

    class Holder(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

    module = Holder()
    method = lightning_peft.PiSSA(2, 6, targets=["layer"], exclude=None)  # a scale of three
    method.attach(module)
    ((_, form),) = method.forms(module)
    torch.testing.assert_close(3 * form.up @ form.down, torch.diag(torch.tensor([5.0, 3.0, 0.0, 0.0], dtype=torch.float64)))
    torch.testing.assert_close(form.up.norm(dim=0), form.down.norm(dim=1))
