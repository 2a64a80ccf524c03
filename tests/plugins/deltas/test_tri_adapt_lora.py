"""TriAdaptLoRA: trained beside a loop of the official code's form, with new parameters for every border that comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft
from lightning_peft import LayerGrowth, StructuredPruning
from lightning_peft.deltas.form import build_form, described
from lightning_peft.deltas.layout import Layout
from lightning_peft.testing import MethodTester
from lightning_peft.testing.callbacks import StopAfter, every_epoch
from lightning_peft.testing.modules import Conv, Plain, deepened, loader
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft_plugins.deltas._tri_adapt_lora.triangular_form import TriangularForm
from lightning_peft_plugins.deltas.tri_adapt_lora import TriAdaptLoRA, growing

WHOLE: dict[str, Any] = {"exclude": None, "checkpoint": "full"}


class TestTriAdaptLoRA(MethodTester):
    methods = [lambda: TriAdaptLoRA(1, 3, every=2, targets="all-weights", tune=("bias",), **WHOLE)]

    def test_compiled(self, lead: Any) -> None:
        pytest.skip("the part is LoRA's, and ranks that grow under a compiler are tested with IncreLoRA")


class Follows(Callback):
    """Notes all blocks before the first step, and the products and ranks after every one."""

    def __init__(self, method: TriAdaptLoRA) -> None:
        self.method = method
        self.first: list[list[tuple[Tensor, ...]]] = []
        self.products, self.ranks, self.states = list[list[Tensor]](), list[list[int]](), list[int]()

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        for _, form in self.method.forms(pl_module):
            blocks = zip(form.down, form.rows, form.columns, form.up, strict=True)
            self.first.append([tuple(part.detach().clone() for part in block) for block in blocks])

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        forms = [form for _, form in self.method.forms(pl_module)]
        self.products.append([form.delta().detach().clone() for form in forms])
        self.ranks.append([form.ranks for form in forms])
        self.states.append(sum(parameter in trainer.optimizers[0].state for form in forms for parameter in form.parameters()))


class Borders:
    """One layer of the official code: lists of blocks, padded with zeros to triangles. Written anew from its description."""

    def __init__(self, blocks: list[tuple[Tensor, ...]]) -> None:
        self.left = blocks
        self.a, self.row, self.column, self.b = [], [], [], []  # type: ignore[var-annotated]
        self.add()
        self.before = self.norm()

    def add(self) -> list[Tensor]:
        new = [part.clone().requires_grad_() for part in self.left.pop(0)]
        for held, part in zip((self.a, self.row, self.column, self.b), new, strict=True):
            held.append(part)
        return new

    @property
    def rank(self) -> int:
        return int(self.row[-1].shape[1])

    def c(self) -> Tensor:
        lower = [F.pad(row, (0, self.rank - row.shape[1])) for row in self.row]
        upper = [F.pad(column, (0, 0, 0, self.rank - column.shape[0])) for column in self.column]
        return torch.cat(lower, 0) + torch.cat(upper, 1)

    def product(self, alpha: float) -> Tensor:
        return torch.cat(self.b, 1) @ (self.c() @ torch.cat(self.a, 0)) * alpha / (self.rank + 1e-5)

    def norm(self) -> float:
        return float(self.c().detach().square().sum().sqrt()) / len(self.row)

    def score(self) -> float:
        before, self.before = self.before, self.norm()
        return self.before - before


def penalty(layers: list[Borders]) -> Tensor:
    wholes = [torch.cat(each, 0) for each in (layer.a for layer in layers)] + [torch.cat(layer.b, 1).T for layer in layers]
    return torch.stack([(w @ w.T - torch.eye(len(w), dtype=w.dtype)).norm() for w in wholes]).sum() / len(wholes)


def output_of(inputs: Tensor, weights: list[tuple[Tensor, Tensor]], products: list[Tensor]) -> Tensor:
    hidden = inputs.double()
    for place, (weight, bias) in enumerate(weights):
        seen = weight + products[place] if place < len(products) else weight
        hidden = F.linear(hidden if place == 0 else hidden.relu(), seen, bias)
    return hidden


@pytest.mark.parametrize("growth", ["linear", "exponential"])
def test_every_step_is_that_of_a_loop_by_hand(growth: Any) -> None:
    target, alpha, increment, warmup, every = 5, 3.0, 1, 2, 3
    method = TriAdaptLoRA(
        1, target, alpha, increment, growth, warmup, every, gamma=0.2, targets=["model.0", "model.2"], exclude=None
    )
    follows = Follows(method)
    torch.manual_seed(0)
    linear = [layer for layer in Plain().requires_grad_(False).model if isinstance(layer, nn.Linear)]
    weights = [(layer.weight.double(), layer.bias.double()) for layer in linear]
    run = fit([method], after=[follows], max_epochs=5, precision="64-true")
    layers = [Borders(list(blocks)) for blocks in follows.first]
    optimizer = torch.optim.Adam([p for layer in layers for p in (*layer.a, *layer.row, *layer.column, *layer.b)], lr=0.02)
    steps, losses, counts = 20, [], []
    for step, (inputs, labels) in enumerate([*loader()] * 5):
        products = [layer.product(alpha) for layer in layers]
        loss = F.cross_entropy(output_of(inputs, weights, products), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        (loss + 0.2 * penalty(layers)).backward()
        missing = 2 * target - sum(layer.rank for layer in layers)
        if missing and step > warmup and step % every == 0:
            share = (step - warmup) / (steps - warmup)
            count = max(1, int(missing * share) if growth == "linear" else int(missing**share))
            scores = [layer.score() for layer in layers]
            threshold = sorted(scores, reverse=True)[min(count, missing, 2) - 1]
            grown = [layer for layer, score in zip(layers, scores, strict=True) if score >= threshold]
            counts.append(len(grown))
            optimizer.add_param_group({"params": [new for layer in grown for new in layer.add()]})
        optimizer.step()
        found = [layer.product(alpha).detach() for layer in layers]
        torch.testing.assert_close(follows.products[step], found, atol=1e-10, rtol=1e-9)
        assert follows.ranks[step] == [layer.rank for layer in layers]
    torch.testing.assert_close(run.losses, losses, atol=1e-10, rtol=1e-10)
    assert set(counts) == {1, 2}, "the number of weights that grow never rose"


def form_of(rank: int = 2, increment: int = 2, blocks: int = 2) -> TriangularForm:
    form = TriangularForm(Layout(torch.Size([9, 7])), rank, 3.0, increment, blocks).double()
    form.reset(torch.zeros(9, 7), torch.Generator().manual_seed(0))
    return form


def filled(form: TriangularForm) -> TriangularForm:
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.fill_(1.0)
    return form


def test_the_middle_has_a_lower_and_an_upper_triangle_of_blocks() -> None:
    form = filled(form_of())
    form.grow(rescale=False)
    form.grow(rescale=False)
    with torch.no_grad():
        for place, value in enumerate((1.0, 2.0, 3.0)):
            form.rows[place].fill_(value)
            form.columns[place].fill_(10 * value)
    expected = torch.tensor([[11.0, 20, 30], [2, 22, 30], [3, 3, 33]], dtype=torch.float64)
    assert torch.equal(form.middle(), torch.kron(expected, torch.ones(2, 2, dtype=torch.float64)))
    # 4 entries of each: the root of 4 (121 + 400 + 900 + 4 + 484 + 900 + 9 + 9 + 1089), over three blocks
    assert form.size().item() == pytest.approx((4 * 3916) ** 0.5 / 3)


def test_all_that_is_trained_learns_after_a_first_step_and_after_a_growth() -> None:
    """The official start, all zeros but one factor, has no gradient for good; nor has a border of zeros."""
    form = form_of(blocks=1)
    optimizer = torch.optim.Adam(form.parameters(), lr=0.1)

    def stuck(steps: int) -> set[str]:
        for _ in range(steps):
            optimizer.zero_grad()
            form.on_weight(torch.eye(9, 7, dtype=torch.float64)).sub(1).square().sum().backward()
            optimizer.step()
        return {name for name, parameter in form.named_parameters() if parameter.grad is None or not parameter.grad.any()}

    block = {f"{kind}.1" for kind in ("down", "rows", "columns", "up")}
    assert form.delta().abs().max() == 0
    assert stuck(1) == {"down.0", "rows.0", "columns.0"} | block
    assert stuck(1) == block
    form.grow(rescale=False)
    assert stuck(1) <= {"down.1", "rows.1"}
    assert stuck(1) == set()


@pytest.mark.parametrize("rescale", [True, False])
def test_a_growth_changes_the_scale_alone(rescale: bool) -> None:
    form = form_of()
    with torch.no_grad():
        form.up[0].normal_()
        form.columns[0].normal_()
    before = form.delta()
    form.grow(rescale)
    expected = before if rescale else before * 2.00001 / 4.00001
    torch.testing.assert_close(form.delta(), expected, atol=1e-12, rtol=1e-12)
    assert before.abs().max() > 0.1


def test_a_file_says_how_far_a_form_has_grown() -> None:
    form = filled(form_of())
    form.grow(rescale=False)
    again = build_form(**described(form)).double()
    again.load_state_dict(form.state_dict())
    assert (again.ranks, again.used) == (4, 2)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="3 of 2 blocks"):
        again.set_extra_state(torch.tensor([3]))
    with pytest.raises(ValueError, match="further blocks, not 1000000000000"):
        build_form("triangular", [9, 7], False, False, {"rank": 1, "increment": 1, "blocks": 10**12})


def test_room_costs_no_optimizer_state_before_it_is_used() -> None:
    method = TriAdaptLoRA(1, 3, every=2, **WHOLE)
    follows = Follows(method)
    fit([method], after=[follows], max_epochs=3)
    # of 12 steps; six ranks are missing: 6 x 2/12, 5 x 4/12, 4 x 6/12, 2 x 8/12 and 1 x 10/12, rounded down but to one at least
    grown = [sum(ranks) - 3 for ranks in follows.ranks]
    assert grown == [0, 0, 1, 1, 2, 2, 4, 4, 5, 5, 6, 6]
    # four parameters of each of three weights; a growth before a step gives a new border its first gradient in the next one
    assert follows.states == [12 + 4 * before for before in [0, *grown[:-1]]]


def test_how_many_grow_by_hand() -> None:
    assert [growing(20, share) for share in (0.0, 0.04, 0.1, 0.29, 1.0)] == [1, 1, 2, 5, 20]
    assert [growing(27, share, exponential=True) for share in (0.0, 1 / 3, 2 / 3, 1.0)] == [1, 3, 9, 27]
    assert growing(100, 0.29) == 29


def test_a_file_for_peft_has_the_ranks_that_count(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Plain()
    method = TriAdaptLoRA(1, 2, every=2, keep=True, targets=["model.0", "model.2"], exclude=None, end=100)
    with pytest.warns(UserWarning, match="ranks had grown"):
        fit([method], module=module, max_epochs=1, expected=())
    assert sorted(method.ranks.values()) == [1, 2]
    inputs = torch.randn(4, 16)
    live = module.eval()(inputs)
    lightning_peft.save_peft(module, tmp_path / "adapter")
    torch.manual_seed(0)
    loaded: Any = peft.PeftModel.from_pretrained(Plain().model, str(tmp_path / "adapter"))
    for name, rank in method.ranks.items():
        layer = loaded.get_submodule(f"base_model.model.{name.split('.')[1]}")
        assert layer.lora_A["default"].weight.shape[0] == rank
    torch.testing.assert_close(loaded.eval()(inputs), live, atol=1e-5, rtol=1e-5)


def test_goes_on_in_a_network_that_grows() -> None:
    method = TriAdaptLoRA(1, 2, every=1, **WHOLE)
    fit([method, LayerGrowth(at="step:2", start=2)], style=deepened(Plain), max_epochs=5)
    assert len(method.ranks) == 3 + 2 * 4
    assert sum(method.ranks.values()) == 2 * 11


def with_a_cut() -> list[Any]:
    return [TriAdaptLoRA(1, 2, every=2, targets=["model.6"], **WHOLE), StructuredPruning(0.3, start=2)]


def test_goes_on_after_a_cut(tmp_path: Path) -> None:
    whole = fit(with_a_cut(), style=Conv, after=[every_epoch(tmp_path)], max_epochs=3)
    resumed = fit(with_a_cut(), style=Conv, resume=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert whole.module.model[6].out_features < 16, "nothing was cut"
    assert whole.methods[0].ranks == {"model.6.weight": 2}
    assert_same(whole, resumed, "uninterrupted against resumed after the cut")


def test_a_training_that_ends_before_the_last_growth_says_so() -> None:
    with pytest.warns(UserWarning, match=r"before ranks had grown to target=8 on average; they are at 1"):
        fit([TriAdaptLoRA(**WHOLE, warmup="50%")], max_epochs=3, after=[StopAfter()], expected=())


def test_refusals_name_what_to_change() -> None:
    for wrong, message in (
        ({"rank": 8}, "target=8 must be above rank=8"), ({"most": 4}, "at most most=4"), ({"increment": 0}, "increment=0"),
        ({"growth": "linea"}, "Did you mean linear"), ({"gamma": -1}, "leaves the penalty out"),
    ):  # fmt: skip
        with pytest.raises(MisconfigurationException, match=message):
            TriAdaptLoRA(**wrong)
    with pytest.raises(MisconfigurationException, match="ends at step 4, and end= is step 3"):
        fit([TriAdaptLoRA(**WHOLE, warmup=4, end=3)])
