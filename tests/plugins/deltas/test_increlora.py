"""IncreLoRA: trained beside a loop of the official code's form, with new parameters for every rank that comes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft
from lightning_peft import IncreLoRA, LayerGrowth, NMSparsity, Run, StructuredPruning
from lightning_peft.testing import MethodTester
from lightning_peft.testing.callbacks import StopAfter, every_epoch
from lightning_peft.testing.modules import Conv, Plain, deepened, loader
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft_plugins.deltas._shared import growing_ranks

WHOLE: dict[str, Any] = {"exclude": None, "checkpoint": "full"}


class TestIncreLoRA(MethodTester):
    methods = [
        lambda: IncreLoRA(1, 2, warmup=0, every=2, tune=("bias",), **WHOLE),
        lambda: IncreLoRA(1, 3, top=1, increment=1, most=3, gamma=0, rescale=True, targets="all-weights", **WHOLE),
    ]
    no_accumulation = "a score is a sum of absolute values, of the batch that comes last"


class Follows(Callback):
    """Notes all blocks before the first step, and the products and ranks after every one."""

    def __init__(self, method: IncreLoRA) -> None:
        self.method = method
        self.first: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.products, self.ranks, self.states = list[list[Tensor]](), list[list[int]](), list[int]()

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        for name, form in self.method.forms(pl_module):
            blocks = zip(form.down, form.values, form.up, strict=True)
            self.first[name] = [tuple(part.detach().clone() for part in block) for block in blocks]  # type: ignore[misc]

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        forms = [form for _, form in self.method.forms(pl_module)]
        self.products.append([form.delta().detach().clone() for form in forms])
        self.ranks.append([form.ranks for form in forms])
        self.states.append(sum(parameter in trainer.optimizers[0].state for form in forms for parameter in form.parameters()))


class Increments:
    """One layer of the official code: lists of factors of one row each, in which a growth makes new parameters.

    Written anew from its description; the first entry has all rows of the start.
    """

    def __init__(self, blocks: list[tuple[Tensor, Tensor, Tensor]], rank: int, increment: int) -> None:
        self.left, self.increment, self.ranknum = blocks, increment, rank
        first = self.left.pop(0)
        self.a, self.e, self.b = ([factor.clone().requires_grad_()] for factor in first)
        self.ipt = self.exp_avg_ipt = self.exp_avg_unc = torch.tensor(0.0, dtype=torch.float64)

    def add_reserve(self) -> list[Tensor]:
        a, _, b = self.left.pop(0)
        new = []
        for row in range(self.increment):
            self.e.append(torch.full((1,), 1e-5, dtype=a.dtype))
            new += [a[row : row + 1].clone().requires_grad_(), b[:, row : row + 1].clone().requires_grad_()]
            self.a.append(new[-2])
            self.b.append(new[-1])
        return new

    def product(self, alpha: float) -> Tensor:
        product = torch.cat(self.b, 1) @ (torch.cat(self.a, 0) * torch.cat(self.e, 0)[:, None])
        return product * alpha / (self.ranknum + 1e-5)

    def update(self, product: Tensor, beta1: float, beta2: float) -> None:
        assert product.grad is not None
        self.ipt = (product.detach() * product.grad).abs().sum() / math.sqrt(product.numel())
        self.exp_avg_ipt = beta1 * self.exp_avg_ipt + (1 - beta1) * self.ipt
        self.exp_avg_unc = beta2 * self.exp_avg_unc + (1 - beta2) * (self.ipt - self.exp_avg_ipt).abs()


def penalty(layers: list[Increments], weight: float) -> Tensor:
    grams = [p @ p.T for layer in layers for p in layer.a] + [p.T @ p for layer in layers for p in layer.b]
    gaps = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype)) for gram in grams]
    return weight * torch.stack(gaps).sum() / len(grams)


def grown(layers: list[Increments], optimizer: torch.optim.Optimizer, count: int) -> None:
    """Let the layers whose scores reach the threshold grow."""
    scores = [float(layer.exp_avg_ipt * layer.exp_avg_unc) for layer in layers]
    threshold = sorted(scores, reverse=True)[count - 1]
    for layer, score in zip(layers, scores, strict=True):
        if score >= threshold:
            layer.ranknum += layer.increment
            opened = [e.requires_grad_() for e in layer.e[-layer.increment :]]
            optimizer.add_param_group({"params": [*opened, *layer.add_reserve()]})


def output_of(inputs: Tensor, weights: list[tuple[Tensor, Tensor]], products: list[Tensor]) -> Tensor:
    hidden = inputs.double()
    for place, (weight, bias) in enumerate(weights):
        seen = weight + products[place] if place < len(products) else weight
        hidden = F.linear(hidden if place == 0 else hidden.relu(), seen, bias)
    return hidden


@pytest.mark.parametrize(("increment", "top", "gamma"), [(1, 1, 0.1), (2, 2, 0.05)])
def test_every_step_is_that_of_a_loop_by_hand(increment: int, top: int, gamma: float) -> None:
    target, alpha, warmup, every = 1 + increment, 3.0, 2, 3
    method = IncreLoRA(
        1, target, alpha, increment, top, warmup, every, most=9, beta1=0.8, beta2=0.7, gamma=gamma,
        targets=["model.0", "model.2"], exclude=None,
    )  # fmt: skip
    follows = Follows(method)
    torch.manual_seed(0)
    linear = [layer for layer in Plain().requires_grad_(False).model if isinstance(layer, nn.Linear)]
    weights = [(layer.weight.double(), layer.bias.double()) for layer in linear]
    run = fit([method], after=[follows], max_epochs=4, precision="64-true")
    layers = [Increments(list(blocks), 1, increment) for blocks in follows.first.values()]
    optimizer = torch.optim.Adam([p for layer in layers for p in (*layer.a, *layer.e, *layer.b)], lr=0.02)
    wanted, sizes, losses = target * 2, [], []
    for step, (inputs, labels) in enumerate([*loader()] * 4):
        products = [layer.product(alpha) for layer in layers]
        for product in products:
            product.retain_grad()
        loss = F.cross_entropy(output_of(inputs, weights, products), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        (loss + penalty(layers, gamma)).backward()
        if step == 0:
            for layer in layers:
                optimizer.add_param_group({"params": layer.add_reserve()})
        missing = wanted - sum(layer.ranknum for layer in layers)
        if missing:
            for layer, product in zip(layers, products, strict=True):
                layer.update(product, 0.8, 0.7)
            if step > warmup and step % every == 0:
                grown(layers, optimizer, min(top, missing // increment))
        sizes.append(sum(layer.ranknum for layer in layers))
        if missing and sizes[-1] == wanted:
            for e in (e for layer in layers for e in layer.e[-increment:]):
                e.fill_(0.0)
        optimizer.step()
        found = [layer.product(alpha).detach() for layer in layers]
        torch.testing.assert_close(follows.products[step], found, atol=1e-10, rtol=1e-9)
        assert follows.ranks[step] == [layer.ranknum for layer in layers]
    assert (sizes[0], sizes[-1]) == (2, wanted)
    torch.testing.assert_close(run.losses, losses, atol=1e-10, rtol=1e-10)


def test_room_costs_no_optimizer_state_before_it_is_used() -> None:
    method = IncreLoRA(1, 2, warmup=0, every=2, top=1, **WHOLE)
    follows = Follows(method)
    fit([method], after=[follows], max_epochs=3)
    # three weights with three parameters each; vectors in reserve from the second step on; growths before steps 3, 5 and 7 ask
    # for a value and, one step later, for the vectors of the next reserve
    assert follows.states[:8] == [9, 15, 15, 18, 18, 21, 21, 24]
    assert follows.states[-1] == 24
    assert sum(follows.ranks[-1]) == 6


def test_the_last_growth_comes_at_half_of_the_training_unless_it_is_said() -> None:
    method = IncreLoRA(1, 3, top=1, increment=1, warmup=0, **WHOLE)  # six growths in the first 12 of 24 steps
    follows = Follows(method)
    fit([method], after=[follows], max_epochs=6)
    assert [sum(ranks) for ranks in follows.ranks] == [3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, *[9] * 12]


def test_a_growth_that_is_rescaled_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(growing_ranks, "rank_zero_info", said.append)

    def jump(rescale: bool) -> float:
        method = IncreLoRA(1, 2, warmup=0, every=6, top=3, rescale=rescale, **WHOLE)
        grows = Grows(method)
        fit([method], after=[grows], max_epochs=3)
        return grows.jump

    assert jump(rescale=False) > 0.1
    assert jump(rescale=True) < 1e-4
    assert said[0].startswith("incre_lora: the ranks have grown to 2 on average at step 6: 2 of model.0.weight, ")


class Grows(Callback):
    """Compares the products before and after the growth, in which no step is made yet."""

    def __init__(self, method: IncreLoRA) -> None:
        self.method, self.before, self.jump = method, list[Tensor](), 0.0

    def products(self, module: LightningModule) -> list[Tensor]:
        return [form.delta().detach() for _, form in self.method.forms(module)]

    def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None:
        self.before = self.products(pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 6:
            pairs = zip(self.before, self.products(pl_module), strict=True)
            self.jump = max(float((a - b).norm() / a.norm()) for a, b in pairs)


@pytest.mark.parametrize("beside", [True, False])
def test_a_score_is_that_of_the_products_gradient(beside: bool) -> None:
    """On both sides of a layer: the gradient of the weight is that of the product."""
    torch.manual_seed(0)
    module = Plain()
    method = IncreLoRA(2, 3, targets=["model.0"], exclude=None)
    method.attach(module)
    ((_, form),) = method.forms(module)
    with torch.no_grad():
        form.values[0].normal_()
    form.watched = True
    inputs, labels = next(iter(loader()))
    layer: Any = module.model[0]
    weight = layer.weight.detach()
    seen = (weight + form.delta().detach()).requires_grad_()
    hidden = F.linear(inputs, seen, layer.bias)
    F.cross_entropy(module.model[1:](hidden), labels).backward()
    assert seen.grad is not None
    expected = ((seen - weight) * seen.grad).abs().sum() / math.sqrt(16 * 16)
    if beside:
        F.cross_entropy(module.model(inputs), labels).backward()
    else:
        F.cross_entropy(module.model[1:](F.linear(inputs, form.on_weight(weight), layer.bias)), labels).backward()
    torch.testing.assert_close(form.score, expected.detach(), atol=1e-7, rtol=1e-5)


def test_a_file_for_peft_has_the_ranks_that_count(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Plain()
    method = IncreLoRA(1, 2, warmup=0, every=2, top=1, keep=True, **WHOLE)
    fit([method], module=module, max_epochs=3)
    assert set(method.ranks.values()) != {2}, "all weights have one rank"
    inputs = torch.randn(4, 16)
    live = module.eval()(inputs)
    lightning_peft.save_peft(module, tmp_path / "adapter")
    torch.manual_seed(0)
    loaded: Any = peft.PeftModel.from_pretrained(Plain().model, str(tmp_path / "adapter"))
    for name, rank in method.ranks.items():
        layer = loaded.get_submodule(f"base_model.model.{name.split('.')[1]}")
        assert layer.lora_A["default"].weight.shape[0] == rank
    torch.testing.assert_close(loaded.eval()(inputs), live, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at", ["step:3", "step:9"])
def test_goes_on_in_a_network_that_grows(at: str) -> None:
    method = IncreLoRA(1, 2, warmup=0, every=1, top=3, **WHOLE)
    fit([method, LayerGrowth(at=at, start=2)], style=deepened(Plain), max_epochs=3)
    assert len(method.ranks) == 3 + 2 * 4
    assert sum(method.ranks.values()) == 2 * 11


def with_a_cut() -> list[Any]:
    return [IncreLoRA(1, 2, warmup=0, every=2, targets=["model.6"], **WHOLE), StructuredPruning(0.3, start=2)]


def test_goes_on_after_a_cut(tmp_path: Path) -> None:
    whole = fit(with_a_cut(), style=Conv, after=[every_epoch(tmp_path)], max_epochs=3)
    resumed = fit(with_a_cut(), style=Conv, resume=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert whole.module.model[6].out_features < 16, "nothing was cut"
    assert whole.methods[0].ranks == {"model.6.weight": 2}
    assert_same(whole, resumed, "uninterrupted against resumed after the cut")


def test_under_a_mask_the_zeros_stay_and_ranks_grow() -> None:
    method = IncreLoRA(1, 2, warmup=0, every=2, targets=["model.0", "model.2"], exclude=None)
    run = fit([method, NMSparsity("2:4", targets=["model.0", "model.2"], exclude=())], max_epochs=3)
    assert sum(method.ranks.values()) == 4
    weight = run.module.model[0].weight
    assert int(weight.view(16, 4, 4).count_nonzero(-1).max()) <= 2


def test_scores_are_unscaled_and_those_of_a_step_that_is_skipped_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    method = IncreLoRA(1, 2, targets=["model.0"], exclude=None)
    module = Plain()
    method.attach(module)
    method._find_forms(module)
    form = method._forms["model.0.weight"]
    scaler = SimpleNamespace(get_scale=lambda: 1024.0)
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: value)
    trainer = SimpleNamespace(strategy=strategy, precision_plugin=SimpleNamespace(scaler=scaler))
    run: Any = Run(trainer, nn.Module(), "", nn.Module())  # type: ignore[arg-type]
    run.step, first = 1, form.down[0]
    monkeypatch.setattr(method, "due", lambda step: False)
    for gradient, score in ((1.0, 2048.0), (torch.inf, 4096.0)):
        first.grad, form.score = torch.full_like(first, gradient), torch.tensor(score)
        method.before_step(run, torch.optim.SGD([first], lr=1.0))
        assert method._scores.tolist() == pytest.approx([0.15 * 2])


def test_a_training_that_ends_before_the_last_growth_says_so() -> None:
    with pytest.warns(UserWarning, match=r"before ranks had grown to target=2 on average; they are at 1"):
        fit([IncreLoRA(**WHOLE, warmup="50%")], max_epochs=3, after=[StopAfter()], expected=())


def test_refusals_name_what_to_change() -> None:
    for wrong, message in (
        ({"rank": 2}, "target=2 must be above rank=2"), ({"most": 1}, "at most most=1"), ({"beta2": 1.0}, "between 0 and 1"),
        ({"gamma": -1}, "leaves the penalty out"), ({"top": 0}, "top=0"), ({"increment": 0}, "increment=0"),
    ):  # fmt: skip
        with pytest.raises(MisconfigurationException, match=message):
            IncreLoRA(**wrong)
