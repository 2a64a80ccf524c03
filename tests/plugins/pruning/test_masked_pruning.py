"""Pruning by masks: every axis in a real training, and the official formulas by hand."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.utils import prune

import lightning_peft
from lightning_peft import (
    GBLM,
    ISSP,
    SAP,
    GroupEnvelope,
    LayerGrowth,
    MagnitudePruning,
    MaskedPruning,
    NMSparsity,
    Wanda,
    WeightCompander,
)
from lightning_peft.functional import pq_pruned
from lightning_peft.testing import MethodTester, run_ddp
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Conv, Plain, deepened, loader, trainer
from lightning_peft.testing.runs import Fit, assert_same, fit
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft_plugins.pruning.scores import wanda

EVERYTHING: Any = ()


def pruned(module: nn.Module) -> dict[str, float]:
    """Share of zeros by weight."""
    return {name: float((p == 0).float().mean()) for name, p in module.named_parameters() if p.ndim > 1}


class TestMaskedPruning(MethodTester):
    """Compositions in one class, because two processes are started once a class."""

    methods = [
        lambda: MaskedPruning(0.5, exclude=EVERYTHING),
        lambda: MaskedPruning(0.7, "taylor", exclude=EVERYTHING, start="25%", end="75%", every=2),
        lambda: MaskedPruning(0.5, "gradient", "block:4x4", "layer", exclude=EVERYTHING, end="60%", every=3, rule="ste"),
        lambda: MaskedPruning(0.6, exclude=EVERYTHING, start=4, end=9, every=5, rewind=2),
        lambda: MagnitudePruning(0.8, exclude=EVERYTHING),
        lambda: Wanda(pattern="2:4", exclude=EVERYTHING, end="50%", every=2),
        lambda: GBLM(0.5, exclude=EVERYTHING, every=4),
        lambda: SAP(exclude=EVERYTHING, scope="row", start="40%", every="30%", end="70%"),
    ]


class TestShrinkage(MethodTester):
    methods = [
        lambda: ISSP(0.6, exclude=EVERYTHING),
        lambda: GroupEnvelope(0.5, strength=1.0, pattern="block:4x4", exclude=EVERYTHING, end="50%"),
        lambda: MaskedPruning(0.5, exclude=EVERYTHING, end="70%", every=3, rule="decay", strength=2.0),
    ]
    no_exact_bake = "while weights shrink, the module computes with them; what it bakes is without them"


class Densities(Callback):
    """Share of weights kept after each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        weights = [getattr(mapped.layer, mapped.attribute) for mapped in mapped_tensors(pl_module)]
        self.seen.append(sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights))


def densities(method: MaskedPruning, **settings: Any) -> list[float]:
    watch = Densities()
    fit([method], after=[watch], **{"max_epochs": 3, **settings})
    return watch.seen


def test_one_choice_at_the_start_is_torchs_own() -> None:
    """Same weights as torch.nn.utils.prune, from the first forward pass on, and the same training."""
    start = Plain()
    mine = fit([MaskedPruning(0.6, exclude=EVERYTHING)], max_epochs=2)

    class Theirs(Plain):
        def build(self) -> None:
            super().build()
            layers = [(layer, "weight") for layer in self.model if isinstance(layer, nn.Linear)]
            prune.global_unstructured(layers, prune.L1Unstructured, amount=0.6)

    theirs = fit([], style=Theirs, max_epochs=2)
    assert mine.losses == theirs.losses
    for a, b in zip(
        (layer for layer in mine.module.model if isinstance(layer, nn.Linear)),
        (layer for layer in theirs.module.model if isinstance(layer, nn.Linear)),
        strict=True,
    ):
        assert torch.equal(a.weight, b.weight_orig * b.weight_mask)
    assert set(pruned(start).values()) == {0.0}


def test_the_amount_follows_zhu_and_gupta() -> None:
    seen = densities(MaskedPruning(0.8, exclude=EVERYTHING, start=2, end=10, every=4))
    total = sum(p.numel() for p in Plain().parameters() if p.ndim > 1)
    for step, density in enumerate(seen, start=1):
        reached = min(max((step - 2) // 4 * 4, 0), 8) if step < 10 else 8  # choices after 2, 6 and 10 steps
        expected = 0.8 + (0.0 - 0.8) * (1 - reached / 8) ** 3
        assert density == pytest.approx(1 - int(expected * total + 1e-6) / total), step


def test_what_is_pruned_stays_pruned_by_rule_zero_and_may_return_by_ste() -> None:
    class Masks(Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.seen.append(torch.cat([entry.held.flatten() for m in mapped_tensors(pl_module) for entry in m.maps]))

    def returned(rule: str) -> bool:
        watch = Masks()
        fit([MaskedPruning(0.6, exclude=EVERYTHING, end="90%", every=1, rule=rule)], after=[watch], max_epochs=4)  # type: ignore[arg-type]
        return any(bool((after & ~before).any()) for before, after in zip(watch.seen, watch.seen[1:], strict=False))

    assert not returned("zero")
    assert returned("ste")


class Shrinkage(Callback):
    """The step of the official code after every optimizer step: the smallest half of each layer times alpha, then zero."""

    def __init__(self, alpha: float, end: int) -> None:
        self.alpha, self.end = alpha, end
        self.masks: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for name, weight in pl_module.named_parameters():
            if weight.ndim < 2:
                continue
            if trainer.global_step <= self.end:
                order = weight.abs().flatten().argsort(stable=True)
                self.masks[name] = torch.ones(weight.numel(), dtype=torch.bool)
                self.masks[name][order[: weight.numel() // 2]] = False
            factor = self.alpha if trainer.global_step < self.end else 0.0
            weight.mul_(torch.where(self.masks[name].view_as(weight), 1.0, factor))


@pytest.mark.parametrize("alpha", [0.95, 1.0, 0.0])
def test_iterative_soft_shrinkage_step_by_step(alpha: float) -> None:
    style = sgd_without_momentum()  # the official code lets pruned weights be moved by momentum and zeroes them after each step
    mine = fit([ISSP(0.5, alpha=alpha, exclude=EVERYTHING, end=8, start=1)], style=style, max_epochs=3)
    theirs = fit([], after=[Shrinkage(alpha, end=8)], style=style, max_epochs=3)
    torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-5, atol=1e-6)
    assert set(pruned(mine.module).values()) == {0.5}


class GrowingDecay(Callback):
    """The gradient of growing regularisation: half of each layer is chosen at the start, its penalty grows."""

    def __init__(self, strength: float, end: int) -> None:
        self.strength, self.end = strength, end
        self.kept: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for name, weight in pl_module.named_parameters():
            if weight.ndim > 1:
                order = weight.detach().abs().flatten().argsort(stable=True)
                kept = torch.ones(weight.numel(), dtype=torch.bool)
                kept[order[: weight.numel() // 2]] = False
                self.kept[name] = kept.view_as(weight)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, kept in self.kept.items():
            weight = pl_module.get_parameter(name)
            if trainer.global_step < self.end:
                weight.grad += (~kept) * self.strength * trainer.global_step / self.end * weight
            else:
                weight.grad *= kept

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step >= self.end:
            for name, kept in self.kept.items():
                pl_module.get_parameter(name).mul_(kept)


def test_growing_decay_step_by_step() -> None:
    style = sgd_without_momentum()
    rule = {"rule": "decay", "strength": 5.0, "shape": "constant", "every": 100, "scope": "layer"}
    once = GrowingDecay(5.0, end=9)
    theirs = fit([], after=[once], style=style, max_epochs=3)
    mine = fit([MaskedPruning(0.5, exclude=EVERYTHING, end=9, **rule)], style=style, max_epochs=3)  # type: ignore[arg-type]
    torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-5, atol=1e-6)
    assert set(pruned(mine.module).values()) == {0.5}
    for name, kept in once.kept.items():
        assert torch.equal(mine.module.get_parameter(name) != 0, kept), "what had decayed was what the last choice pruned"


def sgd_without_momentum() -> type[Plain]:
    class Descent(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Descent


def test_a_checkpoint_from_the_middle_of_shrinkage_is_evaluated_as_trained(tmp_path: Path) -> None:
    fit([ISSP(0.5, exclude=EVERYTHING, end=10)], after=[every_epoch(tmp_path)], max_epochs=3)
    for epoch, masked in ((0, False), (2, True)):
        method, module = ISSP(0.5, exclude=EVERYTHING, end=10), Plain()
        seen: list[float] = []

        class Look(Callback):
            def on_test_start(self, trainer: Any, pl_module: Any, seen: list[float] = seen) -> None:
                seen += [float((m.layer.weight == 0).float().mean()) for m in mapped_tensors(pl_module)]  # type: ignore[union-attr,arg-type]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the ModelCheckpoint that is not here
            trainer(callbacks=[method, Look()]).test(
                module, loader(8), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False, weights_only=True
            )
        assert set(seen) == ({0.5} if masked else {0.0})


class Recorder(Callback):
    """Inputs and gradients of every linear layer in the first steps, taken with hooks of its own."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.inputs: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, list[Tensor]] = {}
        self.weights: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for name, layer in pl_module.named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(layer: nn.Module, args: Any) -> None:
            if layer.training:
                self.inputs.setdefault(name, []).append(args[0].detach().clone())

        return hook

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for mapped in mapped_tensors(pl_module):
            name = mapped.name.removesuffix(".weight")
            self.gradients.setdefault(name, []).append(mapped.stored.grad.clone())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps:
            self.weights = {m.name.removesuffix(".weight"): m.stored.detach().clone() for m in mapped_tensors(pl_module)}
            self.masks = {m.name.removesuffix(".weight"): m.maps[0].held.clone() for m in mapped_tensors(pl_module)}


def lowest(score: Tensor, share: float) -> Tensor:
    """Mask of what stays when the lowest of each row go, as the official code of Wanda sorts."""
    kept = torch.ones_like(score, dtype=torch.bool)
    order = torch.sort(score, dim=-1, stable=True)[1][:, : int(score.shape[1] * share)]
    return kept.scatter_(1, order, False)


def test_wanda_as_its_official_code_computes_it() -> None:
    record = Recorder(3)
    fit([Wanda(0.5, exclude=EVERYTHING, every=3)], after=[record], max_epochs=1)
    for name, weight in record.weights.items():
        row, samples = torch.zeros(weight.shape[1]), 0
        for batch in record.inputs[name][:3]:  # scaler_row of the official WrappedGPT
            row *= samples / (samples + len(batch))
            samples += len(batch)
            row += batch.t().norm(p=2, dim=1) ** 2 / samples
        assert torch.equal(record.masks[name], lowest(weight.abs() * row.sqrt(), 0.5))


def test_gblm_as_its_official_code_computes_it() -> None:
    record = Recorder(3)
    fit([GBLM(0.5, exclude=EVERYTHING, every=3)], after=[record], max_epochs=1)
    for name, weight in record.weights.items():
        inputs = torch.cat(record.inputs[name][:3]).square().sum(0) / sum(len(batch) for batch in record.inputs[name][:3])
        gradient = torch.stack(record.gradients[name][:3]).square().mean(0).sqrt()
        score = weight.abs() * inputs.sqrt() + weight.abs() * (100 * gradient)
        assert torch.equal(record.masks[name], lowest(score, 0.5))


@pytest.mark.parametrize(("score", "formula"), [("taylor", "|wg|"), ("gradient", "|g|"), ("fisher", "w2g2")])
def test_gradient_scores_are_means_over_the_steps_before(score: str, formula: str) -> None:
    record = Recorder(2)
    fit([MaskedPruning(0.5, score, scope="row", exclude=EVERYTHING, every=2, start=2)], after=[record], max_epochs=1)
    for name, weight in record.weights.items():
        gradients = torch.stack(record.gradients[name][:2])
        if formula == "|wg|":
            continue  # needs the weight of each step; its own test is the one step below
        value = gradients.abs().mean(0) if formula == "|g|" else weight.square() * gradients.square().mean(0)
        assert torch.equal(record.masks[name], lowest(value, 0.5))


def test_taylor_multiplies_each_gradient_with_the_weight_it_is_of() -> None:
    record, start = Recorder(1), fit([], max_epochs=0).module
    fit([MaskedPruning(0.5, "taylor", scope="row", exclude=EVERYTHING, every=1, start=1)], after=[record], max_epochs=1)
    for name, gradients in record.gradients.items():
        weight = start.get_submodule(name).weight
        assert torch.equal(record.masks[name], lowest((weight * gradients[0]).abs(), 0.5))


def test_wanda_knows_the_inputs_of_convolutions() -> None:
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    layer = nn.Conv2d(3, 2, 3)
    from lightning_peft_plugins.pruning.statistics import Statistics

    seen = Statistics({"x^2"})
    seen.see_inputs(layer, images)
    torch.testing.assert_close(seen.mean("x^2"), images.square().sum((0, 2, 3)) / 4)
    seen.see_inputs(layer, images)
    torch.testing.assert_close(seen.mean("x^2"), images.square().sum((0, 2, 3)) / 4)
    score = wanda(layer.weight, seen.mean("x^2"), 1)
    torch.testing.assert_close(score[1, 2], layer.weight[1, 2].abs() * (images[:, 2].square().sum() / 4).sqrt())


@pytest.mark.parametrize("pattern", ["channel", "block:4x4", "head:4"])
def test_groups_go_together(pattern: str) -> None:
    from lightning_peft.weights.groups import parse_grouping

    module = fit([MaskedPruning(0.5, pattern=pattern, exclude=EVERYTHING)], style=Conv, max_epochs=2).module
    grouping = parse_grouping(pattern)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            shares = grouping.scores((weight == 0).float(), 1)
            assert ((shares == 0) | (shares == 1)).all(), name
    assert any(share > 0 for share in pruned(module).values())


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_each_choice_sees_only_the_steps_before_it(pattern: str) -> None:
    method = GBLM(pattern=pattern, scope="layer", exclude=EVERYTHING, start=4, end=8, every=4)
    fit([method], max_epochs=2)
    assert {seen.steps for seen in method.watch.seen.values()} == {0}, "the last choice was after the last step"


def test_nothing_is_dead_however_much_is_pruned() -> None:
    module = fit([MaskedPruning(0.99, pattern="channel", exclude=EVERYTHING)], max_epochs=1).module
    assert all(share < 1 for share in pruned(module).values())


def test_other_weight_maps_stay_below() -> None:
    run = fit([WeightCompander(targets="all-linear"), MaskedPruning(0.5, exclude=EVERYTHING)], max_epochs=2)
    total = sum(share * p.numel() for share, p in zip(pruned(run.module).values(), weights(run.module), strict=True))
    assert total == sum(p.numel() for p in weights(run.module)) // 2


@pytest.mark.parametrize("score", ["magnitude", "gblm"])
@pytest.mark.parametrize("at", [1, 7])
def test_layers_that_come_later_are_pruned_too(score: str, at: int) -> None:
    methods = [
        LayerGrowth(start=1, to=3, at=f"step:{at}"),
        MaskedPruning(0.5, score, scope="layer", targets=["fc1", "fc2"], exclude=EVERYTHING, start=2, end=5, every=2),
    ]
    module = fit(methods, style=deepened(Plain), max_epochs=3).module
    shares = {name: share for name, share in pruned(module).items() if name.startswith("blocks")}
    assert len(shares) == 6
    assert set(shares.values()) == {0.5}


def weights(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.ndim > 1]


@pytest.mark.parametrize("start", [3, 4, 5, 6])
def test_resume_between_choices_is_bit_exact(start: int, tmp_path: Path) -> None:
    """The sums over gradients and inputs are half collected in the files of steps 4 and 8."""

    def method() -> MaskedPruning:
        return GBLM(0.6, exclude=EVERYTHING, start=start, end=10, every=3)

    whole: Fit = fit([method()], after=[every_epoch(tmp_path)], max_epochs=3)
    for epoch in (0, 1):
        path = tmp_path / f"epoch={epoch}.ckpt"
        sums = torch.load(path, weights_only=True)["callbacks"]["lightning_peft/gblm"]["state"]["seen"]
        assert any(seen["steps"] for seen in sums.values()) == ((4, 8)[epoch] not in (start, start + 3))
        assert_same(whole, fit([method()], resume=path, seed=9, max_epochs=3), f"resumed after epoch {epoch}")


def rank(folder: str) -> dict[str, Tensor]:
    run = fit([GBLM(0.5, exclude=EVERYTHING, every=2)], devices=2, strategy="ddp", max_epochs=2)
    return {name: p.detach() for name, p in run.module.named_parameters()}


def test_ranks_choose_the_same(tmp_path: Path) -> None:
    first, second = run_ddp(f"{__file__}:rank", {"folder": str(tmp_path)})
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum((p == 0).sum() for p in first.values()) > 0


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
def test_a_checkpoint_is_evaluated_as_trained_and_bakes(tmp_path: Path) -> None:
    fit([MagnitudePruning(0.7, exclude=EVERYTHING)], after=[every_epoch(tmp_path)], max_epochs=3)
    baked = lightning_peft.load_from_checkpoint(Plain, tmp_path / "epoch=2.ckpt")
    runner = trainer(callbacks=[MagnitudePruning(0.7, exclude=EVERYTHING)])
    live = runner.test(Plain(), loader(8), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    plain = trainer().test(baked, loader(8), verbose=False)
    assert live == plain
    zeros = sum(float((p == 0).sum()) for p in weights(baked))
    assert zeros == int(0.7 * sum(p.numel() for p in weights(baked)) + 1e-6)


class Ticket(Callback):
    """A lottery ticket by hand: from 12 steps on the first weights, with masks, a fresh optimizer and a fresh schedule."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.first = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 12:
            return
        weights = {name: p for name, p in pl_module.named_parameters() if p.ndim > 1}
        flat = torch.cat([p.abs().flatten() for p in weights.values()])
        kept = torch.ones_like(flat, dtype=torch.bool)
        kept[flat.argsort(stable=True)[: pq_pruned(flat)]] = False
        parts = kept.split([p.numel() for p in weights.values()])
        self.masks = {name: part.view_as(p) for part, (name, p) in zip(parts, weights.items(), strict=True)}
        pl_module.load_state_dict(self.first)
        trainer.optimizers[0].state.clear()
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(self.schedule)
        trainer.optimizers[0].param_groups[0]["lr"] = self.lr
        for name, parameter in weights.items():
            parameter.mul_(self.masks[name])
            parameter.register_hook(lambda grad, mask=self.masks[name]: grad * mask)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.schedule = copy.deepcopy(trainer.lr_scheduler_configs[0].scheduler.state_dict())
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]


class Decaying(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_round_of_sap_is_a_lottery_ticket() -> None:
    ticket = Ticket()
    theirs = fit([], after=[ticket], style=Decaying, max_epochs=6)
    mine = fit([SAP(exclude=EVERYTHING, start=12, end=None)], style=Decaying, max_epochs=6)
    assert mine.losses == theirs.losses
    share = sum(float((~mask).sum()) for mask in ticket.masks.values()) / sum(mask.numel() for mask in ticket.masks.values())
    assert share > 0.05
    values = dict(mine.module.named_parameters())
    assert all(torch.equal(values[name] == 0, ~mask) for name, mask in ticket.masks.items())


def test_rewinding_needs_a_time_before_the_first_choice() -> None:
    with pytest.raises(MisconfigurationException, match="goes back to step 3, but masks are chosen from step 3 on"):
        fit([MaskedPruning(0.5, exclude=EVERYTHING, start=3, rewind=3)])
    growth = LayerGrowth(start=1, to=2, at="step:2")
    with pytest.raises(MisconfigurationException, match="cannot rewind a network that layer_growth grows"):
        fit([MaskedPruning(0.5, exclude=EVERYTHING, start=3, rewind=0), growth], style=deepened(Plain))
    with pytest.raises(MisconfigurationException, match="of single weights"):
        SAP(pattern="channel")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amount": 1.0}, "between 0 and 1"),
        ({"amount": 0.0}, "between 0 and 1"),
        ({"amount": 0.5, "pattern": "2:4"}, "leave amount= out"),
        ({"score": "magnitud"}, "Did you mean magnitude"),
        ({"scope": "all"}, "global, layer, row"),
        ({"rule": "soft"}, "zero, ste, shrink, decay"),
        ({"rule": "decay"}, "until end=None, which must be given"),
        ({"rule": "decay", "end": "50%", "strength": 0.0}, "must be positive"),
        ({"alpha": 1.5}, "from 0 to 1"),
        ({"pattern": "stripes"}, '"block:RxC"'),
        ({"pattern": "5:4"}, "N <= M"),
        ({"scope": "row", "pattern": "channel"}, 'use "layer"'),
        ({"start": "soon"}, "not a point of training"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        MaskedPruning(**arguments)


def test_what_cannot_be_pruned_is_refused_before_anything_is_touched() -> None:
    class Grouped(Conv):
        def build(self) -> None:
            super().build()
            self.extra = nn.Conv2d(4, 4, 3, groups=2)

    with pytest.raises(MisconfigurationException, match=r"extra is a grouped convolution.*exclude=\['extra'\]"):
        fit([Wanda(0.5, exclude=EVERYTHING)], style=Grouped)
    with pytest.raises(MisconfigurationException, match="matches no module"):
        fit([MaskedPruning(0.5, targets="nowhere")])
    with pytest.raises(MisconfigurationException, match=r"model\.0 has 16 inputs, fewer than one group of 2:32"):
        fit([MaskedPruning(pattern="2:32", targets=["model.0"], exclude=EVERYTHING)])
    with pytest.raises(MisconfigurationException, match="mask"):
        fit([MaskedPruning(0.5, exclude=EVERYTHING), NMSparsity("2:4", exclude=EVERYTHING)])


def test_a_layer_nobody_calls_cannot_be_scored_by_data() -> None:
    class Idle(Plain):
        def build(self) -> None:
            super().build()
            self.idle = nn.Linear(4, 4)

    with pytest.raises(MisconfigurationException, match=r"idle\.weight cannot be scored by 'taylor'.*exclude="):
        fit([MaskedPruning(0.5, "taylor", exclude=EVERYTHING)], style=Idle)
