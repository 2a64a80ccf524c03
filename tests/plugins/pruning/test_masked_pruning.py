"""Pruning by masks in training: the contract, how much is chosen and when, and what goes together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from masked_weights import EVERYTHING, pruned, weights
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_peft import GBLM, SAP, LayerGrowth, MagnitudePruning, MaskedPruning, Wanda, WeightCompander
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Conv, Plain, deepened
from lightning_peft.testing.references import ReferenceChecks
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.weights.groups import parse_grouping
from lightning_peft.weights.maps import mapped_tensors


def pruned_by_torch(task: Task) -> list[float]:
    """Half of all weights leave before the first step, by the functions of torch.nn.utils.prune."""
    layers = [(layer, "weight") for layer in task.module.modules() if isinstance(layer, nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)
    losses = []
    for batch in task.batches:
        loss = task.loss(batch)
        task.step(loss)
        losses.append(loss.item())
    for layer, weight in layers:
        prune.remove(layer, weight)
    return losses


class Zeroed(Plain):
    """Comes with zeros, as an earlier pruning leaves them."""

    def build(self) -> None:
        super().build()
        with torch.no_grad():
            for layer in self.model:
                if isinstance(layer, nn.Linear):
                    layer.weight[layer.weight.abs() < 0.1] = 0.0


def zeros_kept(task: Task) -> None:
    weights = [weight for weight in task.module.parameters() if weight.ndim > 1]
    kept = [weight.detach() != 0 for weight in weights]
    assert all(0.2 < mask.float().mean() < 0.8 for mask in kept)
    for batch in task.batches:
        task.optimizer.zero_grad()
        task.loss(batch).backward()
        for weight, mask in zip(weights, kept, strict=True):
            weight.grad *= mask
        task.optimizer.step()


class TestKeptZeros(ReferenceChecks):
    methods = [lambda: MaskedPruning(mask="keep", exclude=EVERYTHING)]
    references = [Reference(zeros_kept, tolerance=0.0, style=Zeroed), Reference(zeros_kept, style=Zeroed, optimizer="sgd")]


def test_kept_zeros_resume_and_stay_zero(tmp_path: Path) -> None:
    def method() -> MaskedPruning:
        return MaskedPruning(mask="keep", exclude=EVERYTHING)

    whole = fit([method()], style=Zeroed, after=[every_epoch(tmp_path)], max_epochs=3)
    resumed = fit([method()], style=Plain, seed=9, resume=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert_same(whole, resumed, "uninterrupted against resumed in a module without zeros")
    torch.manual_seed(0)
    before = {name: value == 0 for name, value in Zeroed().state_dict().items()}
    assert all(torch.equal(value == 0, before[name]) for name, value in whole.module.state_dict().items() if value.ndim > 1)


def test_zeros_can_be_kept_only_where_there_are_some_and_nothing_else_is_asked_for() -> None:
    with pytest.raises(MisconfigurationException, match=r"no weight of the targets is zero.*with amount= and without mask="):
        fit([MaskedPruning(mask="keep", exclude=EVERYTHING)])
    fit([MaskedPruning(0.5, exclude=EVERYTHING)])
    for given in ({"amount": 0.5}, {"end": "50%"}, {"pattern": "2:4"}, {"rule": "ste"}, {"score": "wanda"}, {"rewind": 0}):
        with pytest.raises(MisconfigurationException, match=f"leave out {next(iter(given))}="):
            MaskedPruning(mask="keep", **given)


class TestMaskedPruning(MethodTester):
    """Compositions in one class, because two processes are started once a class."""

    every_one_sharded = True
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
    references = [Reference(pruned_by_torch, tolerance=0.0)]


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


@pytest.mark.parametrize("pattern", ["channel", "block:4x4", "head:4"])
def test_groups_go_together(pattern: str) -> None:
    module = fit([MaskedPruning(0.5, pattern=pattern, exclude=EVERYTHING)], style=Conv, max_epochs=2).module
    grouping = parse_grouping(pattern)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            shares = grouping.scores((weight == 0).float(), 1)
            assert ((shares == 0) | (shares == 1)).all(), name
    assert any(share > 0 for share in pruned(module).values())


def test_one_of_four_stays() -> None:
    module = fit([MaskedPruning(pattern="1:4", exclude=EVERYTHING)]).module
    assert set(pruned(module).values()) == {0.75}


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
