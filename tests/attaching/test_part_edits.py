"""Layer parts whose layers are cut or copied."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from part_toys import Adapter, AtStep, X, parts_of
from torch import nn

import lightning_peft
from lightning_peft import Lane, Method
from lightning_peft.attaching import averaging as averages
from lightning_peft.structure import depth, journal, slices
from lightning_peft.structure.checkpoint import CheckpointError
from lightning_peft.structure.edits import EditRequest
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, mlp
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.testing.toys import LowRankPart, ToyLowRank
from lightning_peft.weights.parts import placed_parts, put_part

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


def sliced(net, prefix=""):
    """Drop hidden units 4 to 16 of the first layer."""
    kept = [[0, 4]]
    entry = slices.slice_entry
    tensors = {"0.weight": entry([16, 16], {0: kept}), "0.bias": entry([16], {0: kept}), "2.weight": entry([16, 16], {1: kept})}
    return {
        "op": "slice",
        "path": prefix.removesuffix("."),
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


class EditsOnce(Method):
    """Edits the structure after two steps."""

    lane, writes = Lane.STRUCTURE, frozenset({lightning_peft.Resource.STRUCTURE})

    def edit(self, module):
        raise NotImplementedError

    def next_edit(self, run):
        if run.step < 2 or journal.journal_of(run.module):
            return None
        return EditRequest(self.edit(run.module), optimizer_state="copy")


class Cuts(EditsOnce):
    """Cuts hidden units."""

    def edit(self, module):
        return sliced(module, "model.")


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


class Grows(EditsOnce):
    """Copies the first block."""

    def edit(self, module):
        return depth.blocks_edit(module, "model.0", [0, 1, 0]) | {"follow": True}


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
