"""DyLoRA: every step trains a part of the rows, and the adapter works at any rank."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft
from lightning_peft import DyLoRA, LoRA
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.testing import MethodTester
from lightning_peft.testing.modules import Plain, loader
from lightning_peft.testing.runs import fit
from lightning_peft_plugins.deltas.dylora import NestedForm

WHOLE: dict[str, Any] = {"exclude": None, "checkpoint": "full"}


class TestDyLoRA(MethodTester):
    methods = [
        lambda: DyLoRA(3, tune=("bias",), **WHOLE),
        lambda: DyLoRA(3, 2, alpha=4, at=2, frozen=True, targets="all-weights", **WHOLE),
    ]


SIZES = st.integers(2, 5)


def drawn_form(rank: int, frozen: bool = False) -> NestedForm:
    form = NestedForm(Layout(torch.Size([5, 6])), rank, 3 / rank, frozen=frozen).double()
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return form


@given(rank=SIZES, data=st.data())
def test_a_truncated_adapter_is_an_ordinary_one_of_those_rows(rank: int, data: st.DataObject) -> None:
    form, b = drawn_form(rank), data.draw(st.integers(1, rank))
    ordinary = LowRankForm(Layout(torch.Size([5, 6])), b, 3 / b).double()
    with torch.no_grad():
        ordinary.down.copy_(form.down[:b])
        ordinary.up.copy_(form.up[:, :b])
    expected = 3 / b * sum(torch.outer(form.up[:, i], form.down[i]) for i in range(b))
    for place in ("at", "drawn"):
        setattr(form, place, b)
        torch.testing.assert_close(form.delta(), ordinary.delta(), atol=1e-14, rtol=1e-14)
        torch.testing.assert_close(form.delta(), expected, atol=1e-14, rtol=1e-14)
        form.at = rank


@given(rank=SIZES, frozen=st.booleans(), data=st.data())
def test_gradients_of_rows_that_take_no_part_are_exactly_zero(rank: int, frozen: bool, data: st.DataObject) -> None:
    form, b = drawn_form(rank, frozen), data.draw(st.integers(1, rank))
    form.drawn = b
    form.delta().square().sum().backward()
    trained = [i == b - 1 if frozen else i < b for i in range(rank)]
    assert form.down.grad is not None
    assert form.up.grad is not None
    assert [bool(row.any()) for row in form.down.grad] == trained
    assert [bool(column.any()) for column in form.up.grad.T] == trained


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_code_is_that_of_every_drawn_rank(frozen: bool) -> None:
    form, graphs = drawn_form(4, frozen), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda: form.delta(), backend=backend, fullgraph=True)
    for b in (3, 1, 4, 2):
        form.drawn = b
        deltas = [form.delta(), compiled()]
        gradients = [torch.autograd.grad(delta.square().sum(), [form.down, form.up]) for delta in deltas]
        torch.testing.assert_close(*deltas, atol=1e-14, rtol=1e-14)
        torch.testing.assert_close(*gradients, atol=1e-14, rtol=1e-14)
    assert len(graphs) == 1


def test_draws_are_even_and_of_the_step_alone() -> None:
    method = DyLoRA(5, 3, seed=7)
    counts = Counter(method.draw(step) for step in range(3000))
    assert set(counts) == {3, 4, 5}
    assert min(counts.values()) > 900
    torch.manual_seed(9)
    assert [DyLoRA(5, 3, seed=7).draw(step) for step in range(50)] == [method.draw(step) for step in range(50)]
    assert [DyLoRA(5, 3, seed=8).draw(step) for step in range(50)] != [method.draw(step) for step in range(50)]


class Follows(Callback):
    """Notes factors before the first step and after every one, and what the network says outside of steps."""

    def __init__(self, method: DyLoRA) -> None:
        self.method, self.seen, self.drawn = method, list[list[Tensor]](), set[int | None]()

    def factors(self, module: LightningModule) -> list[Tensor]:
        return [p.detach().clone() for _, form in self.method.forms(module) for p in (form.down, form.up)]

    def look(self, module: LightningModule) -> None:
        self.drawn |= {form.drawn for _, form in self.method.forms(module)}

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.seen.append(self.factors(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append(self.factors(pl_module))
        if not trainer.fit_loop._should_accumulate():
            self.look(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.look(pl_module)


@pytest.mark.parametrize("frozen", [False, True])
def test_every_step_is_that_of_a_loop_by_hand(frozen: bool) -> None:
    method = DyLoRA(3, 1, 2, frozen=frozen, seed=4, **WHOLE)
    follows = Follows(method)
    torch.manual_seed(0)
    weights = [(layer.weight.detach(), layer.bias.detach()) for layer in Plain().model if isinstance(layer, nn.Linear)]
    run = fit([method], after=[follows], max_epochs=3)
    flat = [tensor.requires_grad_() for tensor in follows.seen[0]]
    optimizer = torch.optim.Adam(flat, lr=0.02)
    losses, ranks = [], set()
    for step, (inputs, labels) in enumerate([*loader()] * 3):
        b = int(torch.randint(1, 4, (), generator=torch.Generator().manual_seed(hash((4, step)))))
        ranks.add(b)
        hidden = inputs
        for place, (weight, bias) in enumerate(weights):
            down, up = flat[2 * place], flat[2 * place + 1]
            delta = 2 / b * up[:, :b] @ down[:b]
            if frozen:
                first = up[:, : b - 1].detach() @ down[: b - 1].detach()
                delta = 2 / b * (first + torch.outer(up[:, b - 1], down[b - 1]))
            hidden = F.linear(hidden if place == 0 else hidden.relu(), weight + delta, bias)
        loss = F.cross_entropy(hidden, labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(follows.seen[step + 1], [tensor.detach() for tensor in flat], atol=1e-5, rtol=1e-4)
    assert len(ranks) == 3
    torch.testing.assert_close(run.losses, losses, atol=1e-5, rtol=1e-5)


def test_only_training_steps_see_a_draw() -> None:
    """Within accumulated batches too: a validation comes after every batch here, and a step after every second."""
    method = DyLoRA(3, 1, at=3, seed=4, **WHOLE)
    follows = Follows(method)
    fit([method], after=[follows], max_epochs=2, accumulate_grad_batches=2, val_check_interval=1)
    assert follows.drawn == {None}


def test_an_adapter_that_stays_is_truncated_and_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Plain()
    fit([DyLoRA(3, keep=True, **WHOLE)], module=module, max_epochs=2)
    inputs = torch.randn(4, 16)
    whole = module.eval()(inputs)
    DyLoRA.truncate(module, 2)
    live = module(inputs)
    assert not torch.allclose(live, whole, atol=1e-4)
    lightning_peft.save_peft(module, tmp_path / "adapter")
    torch.manual_seed(0)
    loaded: Any = peft.PeftModel.from_pretrained(Plain().model, str(tmp_path / "adapter"))
    assert loaded.get_submodule("base_model.model.0").lora_A["default"].weight.shape == (2, 16)
    torch.testing.assert_close(loaded.eval()(inputs), live, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lightning_peft.bake(module)(inputs), live, atol=1e-6, rtol=1e-6)


def test_the_rank_of_evaluations_is_what_remains() -> None:
    torch.manual_seed(0)
    module, other = Plain(), Plain()
    other.load_state_dict(module.state_dict())
    fit([DyLoRA(3, at=2, keep=True, **WHOLE)], module=module, max_epochs=2)
    fit([DyLoRA(3, at=2, **WHOLE)], module=other, max_epochs=2)
    inputs = torch.randn(4, 16)
    torch.testing.assert_close(module(inputs), other(inputs), atol=1e-6, rtol=1e-6)
    DyLoRA.truncate(module, 3)
    assert not torch.allclose(module(inputs), other(inputs), atol=1e-4)


def test_an_adapter_that_stays_works_as_the_next_fit_is_told_to() -> None:
    module = Plain().train()
    fit([DyLoRA(3, keep=True, **WHOLE)], module=module)
    DyLoRA.truncate(module, 1)
    method = DyLoRA(3, frozen=True, keep=True, **WHOLE)
    fit([method], module=module)
    assert {(form.at, form.frozen) for _, form in method.forms(module)} == {(3, True)}


def test_refusals_name_what_to_change() -> None:
    for wrong, message in (({"least": 3}, r"least=3 .*rank=2"), ({"at": 0}, r"at=0 .*rank=2")):
        with pytest.raises(MisconfigurationException, match=message):
            DyLoRA(**{"rank": 2, **wrong})
    module = Plain().train()
    with pytest.raises(MisconfigurationException, match=r"DyLoRA\(keep=True\)"):
        DyLoRA.truncate(module, 1)
    fit([LoRA(2, keep=True, name="dy_lora", **WHOLE)], module=module)
    with pytest.raises(MisconfigurationException, match=r"No adapter of DyLoRA"):
        DyLoRA.truncate(module, 1)
    module = Plain().train()
    fit([DyLoRA(2, keep=True, **WHOLE)], module=module)
    with pytest.raises(MisconfigurationException, match="from 1 to 2"):
        DyLoRA.truncate(module, 3)
