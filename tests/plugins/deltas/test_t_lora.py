"""TLoRA: rings of tensors beside sums of Kronecker products, and a training beside one that makes every weight of those."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.deltas.layout import Layout
from lightning_peft.network.seeds import named_seed
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.modules import trainer
from lightning_peft_plugins.deltas.t_lora import RingForm, TLoRA, indices

WHOLE: dict[str, Any] = {"exclude": None, "checkpoint": "full"}


def kronecker_sum(first: Tensor, second: Tensor) -> Tensor:
    """``T`` of two tensors: the trace is a sum over both places of the ring, and every term a Kronecker product."""
    ranks = range(first.shape[-1])
    return torch.stack([torch.kron(first[:, :, p, q], second[:, :, q, p]) for p in ranks for q in ranks]).sum(0)


def weights_by_hand(task: Task) -> list[float]:
    """Trains the tensors of two weights of 16 by 16, sides of 4 x 4, that are made anew in every step."""
    module, linear = task.module, [task.module.model[0], task.module.model[2]]
    module.requires_grad_(False)
    rings: list[tuple[list[Tensor], list[Tensor]]] = []
    for name in ("model.0", "model.2"):
        generator = torch.Generator().manual_seed(named_seed(f"t_lora/{name}.weight"))
        drawn = [torch.randn(4, 3, 3, generator=generator) / (4 * 3**0.5) for _ in range(4)]
        drawn[0].zero_()
        eyes = [torch.eye(4)[:, :, None, None].repeat(1, 1, 2, 2) / 2 for _ in range(2)]
        rings.append(([each.requires_grad_() for each in eyes], [each.requires_grad_() for each in drawn]))
    optimizer = torch.optim.Adam([core for ring in rings for cores in ring for core in cores], lr=module.lr)

    def seen(place: int) -> Tensor:
        transform, (a, b, c, d) = rings[place]
        residual = torch.einsum("apq,bqr,crs,dsp->abcd", a, b, c, d).reshape(16, 16)
        return linear[place].weight @ kronecker_sum(*transform) + residual

    losses = []
    for inputs, labels in task.batches:
        hidden = F.linear(inputs, seen(0), linear[0].bias).relu()
        output = module.model[4](F.linear(hidden, seen(1), linear[1].bias).relu())
        loss = F.cross_entropy(output, labels)
        losses.append(float(loss.detach()))
        far = [torch.linalg.vector_norm(core[:, :, p, q] - torch.eye(4) / 2)
               for transform, _ in rings for core in transform for p in range(2) for q in range(2)]  # fmt: skip
        optimizer.zero_grad()
        (loss + 0.05 * torch.stack(far).sum() / 2).backward()
        optimizer.step()
    with torch.no_grad():
        for place, made in enumerate([seen(0), seen(1)]):
            linear[place].weight.copy_(made)
    return losses


class TestTLoRA(MethodTester):
    methods = [lambda: TLoRA(2, 2, 2, gamma=0.01, targets="all-weights", tune=("bias",), **WHOLE)]
    references = [
        Reference(weights_by_hand, lambda: TLoRA(3, 2, 2, gamma=0.05, targets=["model.0", "model.2"], **WHOLE), tolerance=1e-4)
    ]


def drawn(shape: list[int], rank: int, transform_rank: int, factors: int) -> RingForm:
    form = RingForm(Layout(torch.Size(shape)), rank, transform_rank, factors).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return form


@pytest.mark.parametrize("factors", [2, 3])
def test_every_entry_is_a_trace(factors: int) -> None:
    """By the definition, entry by entry: of an index for the whole side, the last factor's runs fastest."""
    form = drawn([8, 12], 2, 3, factors)
    of_rows, of_columns = ([2, 4], [3, 4]) if factors == 2 else ([2, 2, 2], [2, 2, 3])

    def places(index: int, sizes: list[int]) -> list[int]:
        found = []
        for size in reversed(sizes):
            index, rest = divmod(index, size)
            found.insert(0, rest)
        return found

    transform, residual = form.made_transform(), form.residual()
    for i in range(12):
        for j in range(12):
            pairs = zip(places(i, of_columns), places(j, of_columns), strict=True)
            product = torch.eye(3, dtype=torch.float64)
            for core, (row, column) in zip(form.transform, pairs, strict=True):
                product = product @ core[row, column]
            torch.testing.assert_close(transform[i, j], product.trace())
    for i in range(8):
        for j in range(12):
            product = torch.eye(2, dtype=torch.float64)
            for core, place in zip([*form.rows, *form.columns], places(i, of_rows) + places(j, of_columns), strict=True):
                product = product @ core[place]
            torch.testing.assert_close(residual[i, j], product.trace())


def test_a_transform_is_a_sum_of_kronecker_products_of_full_rank_and_a_residual_is_not() -> None:
    form = drawn([15, 20], 2, 2, 2)
    transform = form.made_transform()
    torch.testing.assert_close(transform, kronecker_sum(*form.transform))
    assert torch.linalg.matrix_rank(transform) == 20
    assert torch.linalg.matrix_rank(form.residual()) == 2**2
    weight = torch.randn(15, 20, dtype=torch.float64)
    torch.testing.assert_close(form.of(weight), torch.einsum("oi,ij->oj", weight, transform) + form.residual())


def test_the_square_of_a_transform_is_one_of_kronecker_tensors() -> None:
    """Proposition 2: ``T T^t`` is the ring of ``sum_l A[i, l] (x) A[j, l]``."""
    form = drawn([12, 12], 1, 2, 3)
    square = drawn([12, 12], 1, 4, 3)
    with torch.no_grad():
        for core, own in zip(square.transform, form.transform, strict=True):
            core.copy_(torch.einsum("ilpq,jlrs->ijprqs", own, own).reshape(core.shape))
    transform = form.made_transform()
    torch.testing.assert_close(square.made_transform(), transform @ transform.T)


def test_it_begins_as_the_identity_and_learns_of_the_transform_and_the_first_rows() -> None:
    form = RingForm(Layout(torch.Size([12, 30])), 5, 3, 3).double()
    weight = torch.randn(12, 30, dtype=torch.float64)
    form.reset(weight, torch.Generator().manual_seed(0))
    torch.testing.assert_close(form.made_transform(), torch.eye(30, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(form.of(weight), weight, atol=1e-13, rtol=0)
    assert form.residual().abs().max() == 0
    form.of(weight).square().sum().add(form.gap()).backward()
    live = {name for name, parameter in form.named_parameters() if parameter.grad.abs().max() > 0}
    assert live == {"transform.0", "transform.1", "transform.2", "rows.0"}
    assert all(parameter.grad.isfinite().all() for parameter in form.parameters())
    spread = torch.cat([core.flatten() * core.shape[0] * 5**0.5 for core in (*form.rows[1:], *form.columns)])
    assert spread.std().item() == pytest.approx(1, abs=0.1)


def test_the_gap_by_hand() -> None:
    form = RingForm(Layout(torch.Size([4, 4])), 1, 2, 2)
    form.reset(torch.zeros(4, 4), torch.Generator())
    assert form.gap().item() == 0
    with torch.no_grad():
        form.transform[0][0, 0, 0, 0] += 3
        form.transform[0][0, 1, 0, 0] -= 4
        form.transform[1][1, 1, 1, 0] += 2
    assert form.gap().item() == pytest.approx(5 + 2)


def test_sides_are_split_as_evenly_as_their_divisors_allow() -> None:
    assert indices(768, 3) == [8, 8, 12]
    assert indices(320, 2) == [16, 20]
    assert indices(64, 3) == [4, 4, 4]
    assert indices(30, 3) == [2, 3, 5]
    assert indices(1, 2) == [1, 1]


def test_a_side_without_divisors_is_refused_and_can_be_left_out() -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(211, 4), nn.Linear(4, 4))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(**kwargs: Any) -> None:
        trainer(callbacks=[TLoRA(2, **kwargs)]).fit(Module(), torch.randn(4, 211))  # type: ignore[arg-type]

    with pytest.raises(MisconfigurationException, match=re.escape("net.0.weight, (4, 211), have so few divisors")) as refusal:
        fit(exclude=None)
    (named,) = re.findall(r"exclude=\['([^']*)'\]", str(refusal.value))
    fit(exclude=[named])


def test_arguments_and_files_that_make_no_ring() -> None:
    for wrong, message in (
        ({"factors": 1}, "factors=1 must be 2 to 8"), ({"transform_rank": 0}, "transform_rank=0"), ({"gamma": -1.0}, "leaves"),
    ):  # fmt: skip
        with pytest.raises(MisconfigurationException, match=message):
            TLoRA(**wrong)
    with pytest.raises(ValueError, match="2 to 8 factors"):
        RingForm(Layout(torch.Size([4, 6])), 1, 1, 10**9)
