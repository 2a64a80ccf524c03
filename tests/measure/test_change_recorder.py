"""What a fit changed, told by the weights themselves before and after it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import nn

from lightning_peft import DoRA, LoRA, NMSparsity, bake
from lightning_peft.measure.change_recorder import ChangeRecorder
from lightning_peft.measure.matrices import matrices
from lightning_peft.measure.spectra import effective_rank, intruder_dimensions, stable_rank
from lightning_peft.measure.weight_changes import Learnt, worth_decomposing
from lightning_peft.testing import Plain, loader, trainer
from lightning_peft.testing.toys.structure import ToyWrap


def fitted(*methods, module=None, recorder=None, resume=None, **overrides) -> tuple[Plain, Plain, Learnt]:
    """Return a module before and after a fit, and what was recorded of it."""
    torch.manual_seed(0)
    module, recorder = module or Plain(), recorder or ChangeRecorder()
    before = copy.deepcopy(module)
    data = loader()
    trainer(callbacks=[*methods, recorder], **overrides).fit(module, data, data, ckpt_path=resume)
    return before, module, recorder.learnt


def by_hand(before: Plain, after: Plain) -> dict[str, tuple[float, ...]]:
    """The same from whole copies, by torch's own decomposition."""
    found = {}
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        if old.ndim > 1 and not torch.equal(old, new):
            change = (new - old).detach().double()
            sigma = torch.linalg.svdvals(change)
            figures = change.norm(), change.norm() / old.detach().double().norm(), effective_rank(sigma), stable_rank(sigma)
            found[name] = (*map(float, figures), intruder_dimensions(old, new))
    return found


def agree(learnt: Learnt, wanted: dict[str, tuple[float, ...]], tolerance: float = 1e-4) -> None:
    rows = {row.name: row for row in learnt.rows}
    assert list(rows) == list(wanted)
    for name, (norm, relative, effective, stable, intruders) in wanted.items():
        row = rows[name]
        assert row.norm == pytest.approx(norm, rel=tolerance)
        assert row.relative == pytest.approx(relative, rel=tolerance)
        assert row.effective_rank == pytest.approx(effective, rel=tolerance)
        assert row.stable_rank == pytest.approx(stable, rel=tolerance)
        assert row.intruders == intruders


def test_full_training_is_compared_with_its_start() -> None:
    before, after, learnt = fitted(max_epochs=3)
    wanted = by_hand(before, after)
    assert len(wanted) == 3
    agree(learnt, wanted)
    assert learnt.notes == ()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_a_delta_is_compared_with_the_frozen_weight_and_nothing_is_copied(method, keep) -> None:
    class Watched(ChangeRecorder):
        def on_train_start(self, trainer, pl_module) -> None:
            super().on_train_start(trainer, pl_module)
            assert self._start == {}

    before, after, learnt = fitted(method(rank=2, exclude=None, keep=keep), recorder=Watched(), max_epochs=3)
    seen = copy.deepcopy(after)
    agree(learnt, by_hand(before, bake(seen)), tolerance=2e-3)  # of a small change single precision rounds more
    assert all(row.effective_rank < 2.0001 for row in learnt.rows) or method is DoRA
    assert learnt.notes == ()


def test_small_deltas_are_measured_before_the_weight_rounds_them() -> None:
    class Tiny(ChangeRecorder):
        def on_train_end(self, trainer, pl_module) -> None:
            with torch.no_grad():
                for placed in (part for part in pl_module.modules() if hasattr(part, "form")):
                    placed.form.up.mul_(1e-6)
            super().on_train_end(trainer, pl_module)

    _, _, learnt = fitted(LoRA(rank=1, exclude=None), recorder=Tiny())
    assert [round(row.effective_rank, 3) for row in learnt.rows] == [1, 1, 1]


def test_the_head_beside_deltas_is_measured_too() -> None:
    before, after, learnt = fitted(LoRA(rank=2, tune=("head",)), max_epochs=2)
    agree(learnt, by_hand(before, after), tolerance=2e-3)
    assert learnt.rows[-1].effective_rank > 2 > learnt.rows[0].effective_rank


def test_a_second_training_of_a_kept_delta_is_what_that_one_learnt() -> None:
    module = Plain()
    fitted(LoRA(rank=2, exclude=None, keep=True), module=module)
    seen = bake(copy.deepcopy(module))
    _, after, learnt = fitted(LoRA(rank=2, exclude=None, keep=True), module=module)
    agree(learnt, by_hand(seen, bake(copy.deepcopy(after))), tolerance=5e-3)


def test_masks_are_left_out() -> None:
    class Kept(ChangeRecorder):
        def on_train_start(self, trainer, pl_module) -> None:
            super().on_train_start(trainer, pl_module)
            self.stored = {matrix.name: matrix.stored.detach().clone() for matrix in matrices(pl_module)}

        def on_train_end(self, trainer, pl_module) -> None:
            self.norms = {m.name: (m.stored - self.stored[m.name]).norm().item() for m in matrices(pl_module)}
            super().on_train_end(trainer, pl_module)

    recorder = Kept()
    _, after, learnt = fitted(NMSparsity("2:4", "ste", targets="all-linear"), recorder=recorder)
    assert (after.model[2].weight == 0).float().mean() == 0.5
    assert {row.name: row.norm for row in learnt.rows} == pytest.approx(recorder.norms, rel=1e-5)


def test_recording_changes_no_bit_of_the_training() -> None:
    torch.manual_seed(0)
    alone, data = Plain(), loader()
    trainer(callbacks=[LoRA(rank=2)], max_epochs=2).fit(alone, data, data)
    _, beside, _ = fitted(LoRA(rank=2), max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), beside.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_tells_deltas_and_says_what_it_cannot_tell(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="first", save_top_k=-1)
    method = LoRA(rank=2, tune=("head",))
    fitted(method, saver, max_epochs=1)
    path = next(tmp_path.glob("first*.ckpt"))
    _, _, whole = fitted(LoRA(rank=2, tune=("head",)), max_epochs=2)
    _, _, resumed = fitted(LoRA(rank=2, tune=("head",)), resume=path, max_epochs=2)
    assert resumed.rows == whole.rows[:-1]
    assert resumed.notes == ("What model.4.weight held when the training began is not known: the run was resumed.",)


def test_what_is_too_large_to_keep_is_named() -> None:
    _, _, learnt = fitted(recorder=ChangeRecorder(most=16 * 16 + 16 * 3))
    assert [row.name for row in learnt.rows] == ["model.0.weight", "model.4.weight"]  # the smaller ones first
    assert learnt.notes == (
        "What model.2.weight held when the training began is not known: more than 304 numbers are not kept.",
    )


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module) -> None:
        self.freeze(pl_module.model[0])

    def finetune_function(self, pl_module, epoch, optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model[0], optimizer)


def test_what_was_frozen_at_first_is_named() -> None:
    module = Plain()
    module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    _, _, learnt = fitted(Thaw(), module=module, max_epochs=2)
    assert [row.name for row in learnt.rows] == ["model.2.weight", "model.4.weight"]
    assert learnt.notes == ("What model.0.weight held when the training began is not known: it was frozen then.",)


def test_an_edited_network_is_not_compared() -> None:
    _, _, learnt = fitted(ToyWrap())
    assert learnt.rows == ()
    assert "was edited" in learnt.notes[0]


def test_decompositions_are_spread_within_their_budget() -> None:
    assert worth_decomposing([(10, 10)] * 6, most=3000) == [True, False] * 3
    assert worth_decomposing([(10, 10)] * 6, most=999) == [False] * 6
    assert worth_decomposing([], most=1) == []
    _, _, learnt = fitted(recorder=ChangeRecorder(work=2 * 16**3))
    assert [row.effective_rank is None for row in learnt.rows] == [False, True, False]
    assert all(row.norm > 0 for row in learnt.rows)
    assert learnt.notes == (
        "Ranks and intruders are those of 2 of the 3 matrices, spread over the network: those of all would take more than "
        "8e+03 products.",
    )


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv, self.out = nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 3)
        self.out_again = self.out

    def forward(self, x):
        x = x.unsqueeze(1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out_again(self.conv(x.mT).mean(-1))


def test_attention_and_kernels_are_matrices_and_what_is_shared_counts_once() -> None:
    module = Plain()
    module.model = Odd()
    module.model.out = nn.utils.parametrizations.weight_norm(module.model.out)
    module.model.out_again = module.model.out
    _, _, learnt = fitted(module=module)
    assert [(row.name, row.shape) for row in learnt.rows] == [
        ("model.attention.in_proj_weight", (48, 16)),
        ("model.attention.out_proj.weight", (16, 16)),
        ("model.conv.weight", (16, 48)),
    ]


def test_not_finite_weights_cost_no_report() -> None:
    class Broken(ChangeRecorder):
        def on_train_end(self, trainer, pl_module) -> None:
            with torch.no_grad():
                pl_module.model[0].weight[0, 0] = float("nan")
            super().on_train_end(trainer, pl_module)

    _, _, learnt = fitted(recorder=Broken())
    assert learnt.rows[0].effective_rank is None
    assert learnt.rows[1].effective_rank is not None


def test_what_was_learnt_survives_json() -> None:
    _, _, learnt = fitted()
    assert Learnt.from_data(json.loads(json.dumps(learnt.as_data()))) == learnt
    assert Learnt.from_data({}) == Learnt()
