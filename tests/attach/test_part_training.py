"""Trainings with layer parts: beside averages, through files, over edits of the structure."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

import lightning_peft
from lightning_peft import Lane, LayerPart, Method
from lightning_peft.attach import averaging as averages
from lightning_peft.structure import depth, journal, slices
from lightning_peft.structure.checkpoint import KEY, CheckpointError
from lightning_peft.structure.edits import EditRequest
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, loader, mlp, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.testing.toys import LowRankPart, ToyLowRank
from lightning_peft.testing.trace import difference
from lightning_peft.weights.parts import placed_parts, put_part

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class Adapter(LayerPart):
    """No weight does what it does."""

    kind, lane, lr_scale, optimizer_overrides = "adapter", Lane.DELTA, 0.5, {"weight_decay": 0.0}

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(16, 2), nn.Linear(2, 16)

    def forward(self, output, inputs):
        return output + self.up(self.down(inputs).tanh())


class Adapters(Method):
    lane, parts = Lane.DELTA, (Adapter,)

    def attach(self, module):
        torch.manual_seed(3)
        self.put_part(module, "model.0", Adapter())


class Frozen(Plain):
    """Only what is not the network's own is trained."""

    def __init__(self, optimizer="adam"):
        super().__init__(optimizer)
        self.model.requires_grad_(False)


def parts_of(module):
    return {placed.name: placed.part for placed in placed_parts(module)}


class AtStep(Callback):
    """Keeps what a function says of the module after a step."""

    def __init__(self, step, look):
        self.step, self.look, self.seen = step, look, None

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            self.seen = self.look(trainer, pl_module)


def test_training_is_that_of_a_loop_by_hand():
    run = fit([ToyLowRank()], style=Frozen, optimizer="sgd")
    torch.manual_seed(0)
    net = Frozen("sgd").model
    parts = [LowRankPart(16, 16, 2, 0), LowRankPart(16, 16, 2, 1), LowRankPart(16, 3, 2, 2)]
    layers = [net[0], net[2], net[4]]
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.02)
    for x, y in loader():
        h = x
        for index, (layer, part) in enumerate(zip(layers, parts, strict=True)):
            h = layer(h) + h @ part.down.T @ part.up.T
            h = h.relu() if index < 2 else h
        optimizer.zero_grad()
        nn.functional.cross_entropy(h, y).backward()
        optimizer.step()
    for layer, part, trained in zip(layers, parts, (run.module.model[i] for i in (0, 2, 4)), strict=True):
        assert torch.allclose(layer.weight + part.up @ part.down, trained.weight, atol=1e-5)
        assert part.up.abs().max() > 0.001


def test_parts_train_in_groups_of_their_own():
    at = AtStep(2, lambda trainer, module: (trainer.optimizers[0].param_groups, next(iter(parts_of(module).values()))))
    with pytest.warns(UserWarning, match="without the part 'adapter' of Adapters on model.0"):
        fit([Adapters()], after=[at])
    groups, part = at.seen
    own = next(group for group in groups if any(p is part.up.weight for p in group["params"]))
    assert {id(p) for p in own["params"]} == {id(p) for p in part.parameters()}
    assert own["lr"] == pytest.approx(groups[0]["lr"] * 0.5)
    assert own["weight_decay"] == 0.0


class Answers(Plain):
    def on_test_epoch_end(self):
        self.answer = self(X)

    def test_step(self, batch, batch_idx):
        return None


def test_what_went_into_the_weight_is_beside_it_again_for_an_evaluation():
    at = AtStep(4, lambda trainer, module: module(X))
    run = fit([ToyLowRank()], style=Answers, after=[at])
    before = copy.deepcopy(run.module.state_dict())
    trainer(callbacks=[ToyLowRank()]).test(run.module, loader(), verbose=False)
    assert torch.equal(run.module.answer, at.seen), "not with the part twice"
    assert difference(before, run.module.state_dict()) is None


@pytest.mark.filterwarnings("ignore:.*without the part:UserWarning")
def test_what_no_weight_does_comes_back_for_evaluation_and_the_next_fit(tmp_path):
    at = AtStep(4, lambda trainer, module: module(X))
    run = fit([Adapters()], style=Answers, after=[at, every_epoch(tmp_path)])
    assert not torch.allclose(run.module(X), at.seen, atol=1e-4), "after the fit the module is without the part"
    path = tmp_path / "epoch=0.ckpt"
    fresh = Answers()
    trainer(callbacks=[Adapters()]).test(fresh, loader(), ckpt_path=path, weights_only=True, verbose=False)
    assert torch.equal(fresh.answer, at.seen)
    before = copy.deepcopy(run.module.state_dict())
    trainer(callbacks=[Adapters()]).test(run.module, loader(), verbose=False)
    assert torch.equal(run.module.answer, at.seen), "what was stashed"
    assert difference(before, run.module.state_dict()) is None
    with pytest.raises(CheckpointError, match=r"'adapter' of Adapters on model\.0 .*Trainer\(callbacks=\[Adapters"):
        lightning_peft.load_from_checkpoint(Answers, path)


def test_a_switch_is_saved(tmp_path):
    class Off(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 2:
                next(iter(parts_of(pl_module).values())).enabled = False

    full = fit([ToyLowRank()], after=[Off(), every_epoch(tmp_path)], max_epochs=2)
    seen = AtStep(8, lambda trainer, module: [part.enabled for part in parts_of(module).values()])
    resumed = fit([ToyLowRank()], seed=7, after=[seen], resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert seen.seen == [False, True, True]
    assert_same(full, resumed, "a part that was switched off, uninterrupted against resumed")


def test_the_file_is_an_ordinary_one(tmp_path):
    at = AtStep(4, lambda trainer, module: module(X))
    fit([ToyLowRank()], after=[at, every_epoch(tmp_path)])
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Plain().state_dict())
    plain = Plain.load_from_checkpoint(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert torch.allclose(plain(X), at.seen, atol=1e-5), "without the library"
    assert set(checkpoint[KEY]["part_weights"]) == {"model.0.weight", "model.2.weight", "model.4.weight"}
    with_it = lightning_peft.load_from_checkpoint(Plain, tmp_path / "epoch=0.ckpt")
    assert difference(dict(with_it.state_dict()), dict(plain.state_dict())) is None


def test_another_set_of_parts_is_refused_for_a_fit_and_baked_for_a_test(tmp_path):
    fit([ToyLowRank()], after=[every_epoch(tmp_path)])
    path = tmp_path / "epoch=0.ckpt"
    with pytest.raises(CheckpointError, match=r"model\.4 had the part 'toy_low_rank' of toy_low_rank .* no part now"):
        fit([ToyLowRank(exclude=["model.4"])], resume=path, max_epochs=2)
    with pytest.raises(CheckpointError, match=r"down of the part 'toy_low_rank' .* on model\.0 does not fit.*\(2, 16\)"):
        fit([ToyLowRank(rank=3)], resume=path, max_epochs=2)
    module = Plain()
    trainer(callbacks=[ToyLowRank(exclude=["model.4"])]).validate(
        module, loader(), ckpt_path=path, weights_only=True, verbose=False
    )
    plain = Plain.load_from_checkpoint(path, weights_only=True)
    assert torch.allclose(module(X), plain(X), atol=1e-6)


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_averages_hold_averaged_parts_and_resume_with_them(kind, tmp_path):
    def average():
        return EMAWeightAveraging(decay=0.5) if kind == "EMA" else StochasticWeightAveraging(1e-2, swa_epoch_start=1)

    class Follows(Callback):
        def __init__(self):
            self.expected = None

        def on_train_batch_end(self, trainer, pl_module, *args):
            up = next(iter(parts_of(pl_module).values())).up.detach()
            if self.expected is None:
                self.expected = torch.zeros_like(up)
            self.expected = up.clone() if trainer.global_step == 1 else self.expected * 0.5 + up * 0.5

    follows, ema = Follows(), average()
    full = fit([ToyLowRank()], before=[ema], after=[follows, every_epoch(tmp_path)], max_epochs=3)
    resumed = fit([ToyLowRank()], seed=9, before=[average()], resume=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert_same(full, resumed, "uninterrupted against resumed beside an average")
    if kind == "EMA":
        file = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
        shown = file[KEY]["parts"]["model.0"][0]["state"]["up"]
        assert torch.allclose(shown, follows.expected, atol=1e-6), "the file shows the average, by hand"
        assert not torch.allclose(shown, file[KEY]["part_copies"][0]["model.0"][0]["up"])
        plain = Plain.load_from_checkpoint(tmp_path / "epoch=2.ckpt", weights_only=True)
        assert torch.allclose(plain(X), full.module(X), atol=1e-6), "the average, by the file and after the fit"


class Functional(Plain):
    """Reads a weight without calling its layer."""

    def forward(self, x):
        first = self.model[0]
        return self.model[1:](nn.functional.linear(x, first.weight, first.bias))


def test_a_weight_that_is_read_without_a_call_is_found_at_the_first_step():
    with pytest.raises(MisconfigurationException, match=r"model\.0\.weight has a gradient, but.*not called.*exclude=\['model"):
        fit([ToyLowRank()], style=Functional)
    fit([ToyLowRank(exclude=["model.0"])], style=Functional)


class Spare(Frozen):
    def forward(self, x):
        return self.model[2:](x)


def test_a_part_that_no_call_reaches_is_warned_of():
    with pytest.warns(UserWarning, match="No call of its layer reached the part 'toy_low_rank' of ToyLowRank on model.0,"):
        fit([ToyLowRank()], style=Spare)


class HeadOnly(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.model[4].parameters(), lr=0.1)


def test_a_part_that_no_optimizer_trains_is_warned_of():
    with pytest.warns(UserWarning, match=r"No optimizer trains the part 'toy_low_rank' of ToyLowRank on model\.0 \(1 more\)"):
        fit([ToyLowRank()], style=HeadOnly)


def sliced(net, prefix=""):
    """Drop hidden units 4 to 16 of the first layer."""
    kept = [[0, 4]]
    entry = slices.slice_entry
    tensors = {"0.weight": entry([16, 16], {0: kept}), "0.bias": entry([16], {0: kept}), "2.weight": entry([16, 16], {1: kept})}
    return {
        "op": "slice",
        "path": prefix,
        "tensors": {f"{prefix}{name}": value for name, value in tensors.items()},
        "attributes": {f"{prefix}0": {"out_features": [16, 4]}, f"{prefix}2": {"in_features": [16, 4]}},
    }


def with_parts(net, prefix=""):
    for name in ("0", "2"):
        part = put_part(net, f"{prefix}{name}", LowRankPart(16, 16))
        with torch.no_grad():
            part.up.normal_(generator=torch.Generator().manual_seed(5))
    return net


def test_a_part_is_cut_with_its_layer_and_mended():
    net = with_parts(mlp())
    first, second = (placed.part for placed in placed_parts(net))
    held = [p.detach().clone() for p in (first.up, first.down, second.up, second.down)]
    parameters, before = [first.up, second.down], net(X)
    journal.edit(net, sliced(net))
    assert torch.equal(first.up, held[0][:4])
    assert torch.equal(first.down, held[1])
    assert torch.equal(second.up, held[2])
    assert torch.equal(second.down, held[3][:, :4])
    assert first.up is parameters[0]
    assert second.down is parameters[1]
    live = net(X)
    assert torch.allclose(lightning_peft.bake(copy.deepcopy(net))(X), live, atol=1e-6)
    journal.take_back(net)
    assert torch.equal(net(X), before)


def test_a_part_that_does_not_say_how_is_not_cut_with_its_layer():
    net = mlp()
    put_part(net, "2", Adapter()).owner = "Adapters"
    with pytest.raises(CheckpointError, match=r"2\.weight should be cut, but the layer part 'adapter' .*exclude=\['2'\]"):
        journal.edit(net, sliced(net))
    assert net[0].weight.shape == (16, 16)


class Cuts(Method):
    """Cuts hidden units after two steps."""

    lane, writes = Lane.STRUCTURE, frozenset({lightning_peft.Resource.STRUCTURE})

    def __init__(self):
        super().__init__()

    def next_edit(self, run):
        if run.step < 2 or journal.journal_of(run.module):
            return None
        return EditRequest(sliced(run.module, "model."), optimizer_state="copy")


@pytest.mark.parametrize("averaged", [False, True])
def test_optimizer_state_and_averages_are_cut_along(averaged, tmp_path):
    def look(trainer, module):
        part = next(iter(parts_of(module).values()))
        shown = [part.up, trainer.optimizers[0].state[part.up]["exp_avg"]]
        return [tuple(tensor.shape) for tensor in shown]

    def before():
        return [EMAWeightAveraging(decay=0.5)] if averaged else []

    at = AtStep(4, look)
    full = fit([ToyLowRank(), Cuts()], before=before(), after=[at, every_epoch(tmp_path)], max_epochs=2)
    assert at.seen == [(4, 2), (4, 2)]
    resumed = fit([ToyLowRank(), Cuts()], seed=3, before=before(), resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert_same(full, resumed, "cut in training, uninterrupted against resumed")


def test_the_average_of_a_part_is_cut_as_the_part_is():
    class ByHand(Callback):
        average, shown = None, None

        def on_train_batch_end(self, trainer, pl_module, *args):
            up = next(iter(parts_of(pl_module).values())).up.detach()
            old = self.average if self.average is None else self.average[: len(up)]
            self.average = up.clone() if old is None else 0.5 * old + 0.5 * up
            (averaged,) = averages.averaged_modules(trainer)
            self.shown = next(iter(parts_of(averaged).values())).up.detach().clone()

    by_hand = ByHand()
    fit([ToyLowRank(), Cuts()], before=[EMAWeightAveraging(decay=0.5)], after=[by_hand])
    assert by_hand.shown.shape == (4, 2)
    assert torch.allclose(by_hand.shown, by_hand.average, atol=1e-6)


class Blocks(Plain):
    """Two blocks of one kind, so that a list can grow."""

    def __init__(self, optimizer="adam"):
        super().__init__(optimizer)
        torch.manual_seed(1)
        self.model = nn.Sequential(
            nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))), nn.Linear(16, 3)
        )


class Grows(Method):
    lane, writes = Lane.STRUCTURE, frozenset({lightning_peft.Resource.STRUCTURE})

    def __init__(self):
        super().__init__()

    def next_edit(self, run):
        if run.step < 2 or journal.journal_of(run.module):
            return None
        edit = depth.blocks_edit(run.module, "model.0", [0, 1, 0])
        return EditRequest({**edit, "follow": True}, optimizer_state="copy")


def test_a_copied_block_has_a_copy_of_the_part_that_trains_on(tmp_path):
    def look(trainer, module):
        parts = parts_of(module)
        old, new = (parts[f"model.0.{block}.0.layer_parts.toy_low_rank:toy_low_rank"] for block in (0, 2))
        groups = trainer.optimizers[0].param_groups
        trained = sum(p is new.up for group in groups for p in group["params"])
        return list(parts), trained, trainer.optimizers[0].state[new.up]["step"].item(), (old.up - new.up).abs().max().item()

    at = AtStep(3, look)
    full = fit([ToyLowRank(), Grows()], style=Blocks, after=[at, every_epoch(tmp_path)], max_epochs=2)
    names, trained, steps, apart = at.seen
    assert len(names) == 4
    assert trained == 1
    assert steps == 3, "its optimizer state is a copy too"
    assert 0 < apart < 0.1, "one step after the copy"
    resumed = fit([ToyLowRank(), Grows()], style=Blocks, seed=3, resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert_same(full, resumed, "blocks copied in training, uninterrupted against resumed")
