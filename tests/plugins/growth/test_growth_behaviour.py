"""When networks grow, and what becomes of optimizer state and learning rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growth_toys import Deep, blocks, grow
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft import LayerGrowth
from lightning_peft.functional import growth_tokens
from lightning_peft.structure.journal import journal_of
from lightning_peft.testing.callbacks import PlannedError
from lightning_peft.testing.modules import Plain, deepened, loader, trainer
from lightning_peft.testing.runs import fit
from lightning_peft_plugins.growth._layer_growth.depth_operators import interpolated, last_repeated, new_places, paired, stacked
from lightning_peft_plugins.growth._shared.triggers import Plateau


class Watch(Callback):
    """Blocks, gradients and optimizer state at every batch start and end."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.sizes.append(len(pl_module.blocks))


class SGD(Deep):  # type: ignore[misc,valid-type]
    """Plain SGD on a gradient of one everywhere, so that a step moves every weight by the learning rate in force."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.before = self.blocks[0].fc1.weight[0, 0].item()
        loss = sum(parameter.sum() for parameter in self.parameters())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Rates(Callback):
    """The learning rate each step was taken with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(round(pl_module.before - pl_module.blocks[0].fc1.weight[0, 0].item(), 4))


def sizes(methods: Any, **settings: Any) -> list[int]:
    watch = Watch()
    grow(methods, after=[watch], **settings)
    return watch.sizes


@pytest.mark.parametrize("at", ["step:4", "epoch:1", 4, "4"])
def test_points(at: Any) -> None:
    assert sizes([LayerGrowth(at=at, start=2)], max_epochs=2) == [2] * 4 + [4] * 4


def test_a_share_of_training() -> None:
    assert sizes([LayerGrowth(at="75%", start=2)], max_epochs=2) == [2] * 6 + [4] * 2


def test_several_events() -> None:
    assert sizes([LayerGrowth(at=["25%", "epoch:1"], start=1, to=[2, 3])], max_epochs=2) == [1, 1, 2, 2, 3, 3, 3, 3]


def test_events_of_one_moment_follow_each_other() -> None:
    assert sizes([LayerGrowth(at=[1, 1], start=1, to=[2, 4])], max_epochs=1) == [1, 4, 4, 4]


def test_tokens() -> None:
    class Reads(Deep):  # type: ignore[misc,valid-type]
        def base_loss(self, batch: Any) -> Tensor:
            return super().base_loss((torch.nn.functional.one_hot(batch["input_ids"], 16).float().sum(1), batch["labels"]))

    rows: list[Any] = [{"input_ids": torch.arange(5), "labels": index % 3} for index in range(32)]
    data = DataLoader(rows, batch_size=8)
    watch = Watch()
    module = Reads()
    runner = trainer(callbacks=[LayerGrowth(at="tokens:80", start=2), watch])
    runner.fit(module, data, data)
    assert watch.sizes == [2, 2, 4, 4]  # 40 tokens a batch


def test_tokens_need_tokens() -> None:
    class Floats(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch).sum()

    data = DataLoader(torch.randn(8, 16), batch_size=4)
    with pytest.raises(MisconfigurationException, match="no tensor of integers"):
        trainer(callbacks=[LayerGrowth(at="tokens:80", start=2)]).fit(deepened(Floats)(), data, loader(8))


def test_plateau() -> None:
    class Flat(Deep):  # type: ignore[misc,valid-type]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            falls = [4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
            self.log("val/loss", falls[self.current_epoch])

    method = LayerGrowth(at=["plateau", "plateau"], start=1, to=[2, 4], patience=2)
    seen = sizes([method], style=Flat, max_epochs=10)
    assert seen[::4] == [1, 1, 1, 1, 1, 2, 2, 2, 2, 4]  # two looks without progress: epochs 3 and 4, then 7 and 8


def test_plateau_names_what_was_logged() -> None:
    with pytest.raises(MisconfigurationException, match=r"watches val/accuracy.*logged are loss"):
        grow([LayerGrowth(at="plateau", start=2, monitor="val/accuracy")])


def test_never_within_an_accumulation_window() -> None:
    assert sizes([LayerGrowth(at="step:1", start=2)], max_epochs=1, accumulate_grad_batches=3) == [2, 2, 2, 4]
    manual = sizes([LayerGrowth(at="step:1", start=2)], max_epochs=1, accumulate_grad_batches=1)
    assert manual == [2, 4, 4, 4]


def test_a_tuner_does_not_grow_the_network() -> None:
    class Tuned(Deep):  # type: ignore[misc,valid-type]
        learning_rate = 0.01

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    during: list[int] = []

    class Finder(LearningRateFinder):
        def lr_find(self, trainer: Any, pl_module: Any) -> None:
            super().lr_find(trainer, pl_module)
            during.append(len(pl_module.blocks))

    finder = Finder(num_training_steps=8, early_stop_threshold=None)
    run = grow([LayerGrowth(at="step:2", start=2)], style=Tuned, before=[finder], max_epochs=1)
    assert during == [2]
    assert blocks(run) == 4


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("continue", [1.0, 0.95, 0.9, 0.85, 0.8, 0.75]),
        ("restart", [1.0, 0.95, 1.0, 0.95, 0.9, 0.85]),
        ("rewarm:4", [1.0, 0.95, 0.225, 0.425, 0.6, 0.75]),
        ("rewarm:2@0.5", [1.0, 0.95, 0.225, 0.425, 0.4, 0.375]),
    ],
)
def test_learning_rates(rule: str, expected: list[float]) -> None:
    rates = Rates()
    grow([LayerGrowth(at="step:2", start=2, lr=rule)], style=SGD, after=[rates], max_epochs=2)
    assert rates.seen[:6] == pytest.approx(expected, abs=1e-3)


class States(Callback):
    """Adam's moments right before and after growth, by name."""

    def __init__(self) -> None:
        self.taken: list[dict[str, dict[str, Tensor]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        state = trainer.optimizers[0].state
        held = {name: state.get(parameter, {}) for name, parameter in pl_module.named_parameters()}
        self.taken.append({name: {k: v.clone() for k, v in values.items()} for name, values in held.items()})


def moments(rule: str, operator: str = "stack") -> tuple[dict[str, Any], dict[str, Any]]:
    first, last = States(), States()
    grow([LayerGrowth(operator, at="step:3", start=2, optimizer_state=rule)], before=[first], after=[last], max_epochs=1)
    return first.taken[3], last.taken[3]


def test_states_are_copied() -> None:
    before, after = moments("copy")
    for place, source in enumerate([0, 1, 0, 1]):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(after[f"blocks.{place}.fc1.weight"][key], before[f"blocks.{source}.fc1.weight"][key])
    assert torch.equal(after["model.0.weight"]["exp_avg"], before["model.0.weight"]["exp_avg"])


def test_states_of_new_blocks_begin_anew() -> None:
    before, after = moments("pad")
    assert after["blocks.2.fc1.weight"] == {}
    assert all(
        torch.equal(after["blocks.1.fc1.weight"][key], before["blocks.1.fc1.weight"][key]) for key in ("exp_avg", "step")
    )


def test_states_are_reset() -> None:
    before, after = moments("reset")
    assert before["model.0.weight"]
    assert not any(after.values())


def test_stackedbert_counts_steps_from_zero() -> None:
    before, after = moments("copy", "stackedbert")
    assert before["model.0.weight"]["step"] == 3
    assert all(state["step"] == 0 for state in after.values())
    assert torch.equal(after["blocks.2.fc1.bias"]["exp_avg"], before["blocks.0.fc1.bias"]["exp_avg"])


def test_groups_are_extended_in_place() -> None:
    class Grouped(Deep):  # type: ignore[misc,valid-type]
        def configure_optimizers(self) -> Any:
            layers = [{"params": list(block.parameters()), "lr": 0.01 * (n + 1)} for n, block in enumerate(self.blocks)]
            return torch.optim.Adam([*layers, {"params": self.model.parameters(), "lr": 0.02}])

    run = grow([LayerGrowth(at="step:2", start=2)], style=Grouped, max_epochs=1)
    groups = run.trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [0.01, 0.02, 0.02]
    assert [len(group["params"]) for group in groups] == [12, 12, 6]
    assert any(p is run.module.blocks[2].fc1.weight for p in groups[0]["params"])


def test_frozen_blocks_have_frozen_copies() -> None:
    class Frozen(Deep):  # type: ignore[misc,valid-type]
        def build(self) -> None:
            super().build()
            self.blocks[0].requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.02)

    run = grow([LayerGrowth(at="step:2", start=2)], style=Frozen)
    assert not any(p.requires_grad for p in run.module.blocks[2].parameters())
    trained = {id(p) for group in run.trainer.optimizers[0].param_groups for p in group["params"]}
    assert not any(id(p) in trained for p in run.module.blocks[2].parameters())
    assert torch.equal(run.module.blocks[0].fc1.weight, run.module.blocks[2].fc1.weight)


def test_the_journal_says_what_happened() -> None:
    run = grow([LayerGrowth(at=["step:2", "step:5"], start=1, to=[2, 4])])
    journal = [(edit["sources"], edit["step"], edit["by"]) for edit in journal_of(run.module)]
    assert journal == [([0], 0, "layer_growth"), ([0, 0], 2, "layer_growth"), ([0, 1, 0, 1], 5, "layer_growth")]


def test_stacking_laws() -> None:
    assert stacked(6, 24) == list(range(6)) * 4
    assert interpolated(3, 6) == [0, 0, 1, 1, 2, 2]
    assert last_repeated(6, 9) == [0, 1, 2, 3, 4, 5, 3, 4, 5]  # index 2 * now - target + i
    assert paired(3, 6) == [0, 0, 1, 1, 2, 2]


@given(st.integers(1, 12), st.integers(1, 24))
@settings(deadline=None)
def test_every_operator_keeps_every_block_once(now: int, more: int) -> None:
    to = now + more
    for operator in (stacked, interpolated, last_repeated, *([paired] if to <= 2 * now else [])):
        sources = operator(now, to)
        assert len(sources) == to
        assert set(sources) == set(range(now))
        assert len(new_places(sources)) == more
        firsts = [sources.index(block) for block in range(now)]
        assert firsts == sorted(firsts)


@pytest.mark.parametrize(
    ("parameters", "tokens", "billions"),
    [(7e9, 2e12, 11.11), (8e9, 15e12, 6.58), (13e9, 2e12, 15.84), (70e9, 2e12, 42.48)],
)
def test_the_published_table_of_the_token_law(parameters: float, tokens: float, billions: float) -> None:
    assert growth_tokens(parameters, 6 * parameters * tokens) / 1e9 == pytest.approx(billions, abs=0.005)


def test_a_metric_below_zero_makes_progress_by_the_same_share() -> None:
    plateau = Plateau(patience=2, min_delta=0.01)
    for value, waited in ((-1.0, 0), (-1.005, 1), (-1.02, 0), (-1.0, 1), (-1.025, 2)):
        plateau.look(value)
        assert plateau.waited == waited, value
    assert plateau.reached


@pytest.mark.parametrize(("at", "left"), [(0, 4), (2, 1)])
def test_a_fit_that_fails_gives_the_built_structure_back_unless_it_trained_another(at: int, left: int) -> None:
    torch.manual_seed(0)
    module = deepened(Plain)()

    class Early(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            assert len(pl_module.blocks) == 1
            if trainer.global_step == at:
                raise PlannedError

    with pytest.raises(PlannedError):
        fit([LayerGrowth(start=1, at="step:4")], module=module, after=[Early()])
    assert len(module.blocks) == left


class Counted(Plain):
    """Loops over the number of blocks it was built with."""

    loop, share = "range", 0.0

    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__(optimizer)
        self.layerdrop = self.share
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(16) for _ in range(2))
        self.n = 2

    def base_loss(self, batch: Any) -> Tensor:
        x, y = batch
        for block in self.run_blocks():
            x = x + block(x)
        return super().base_loss((x, y))

    def run_blocks(self) -> list[torch.nn.Module]:
        if self.loop == "zip":
            return [block for block, _ in zip(self.blocks, self.norms, strict=False)]
        return [self.blocks[i] for i in range(len(self.blocks) if self.loop == "list" else self.n)]


@pytest.mark.parametrize("operator", ["stack", "interpolate"])
@pytest.mark.parametrize("kind", ["range", "zip", "list"])
def test_new_blocks_that_never_run_are_refused_after_the_first_step(kind: str, operator: str) -> None:
    class Loops(Counted):
        loop = kind

    def growth() -> LayerGrowth:
        return LayerGrowth(operator, at="step:2", to=4, blocks="blocks")

    if kind == "list":  # the cure
        grow([growth()], style=Loops)
        return
    with pytest.raises(
        MisconfigurationException, match=r"blocks has 4 blocks.*none after the first 2 ran.*for block in self\."
    ):
        grow([growth()], style=Loops)


def test_blocks_dropped_at_random_are_waited_for() -> None:
    class Drops(Counted):
        share = 0.1

    grow([LayerGrowth(at="step:2", to=4, blocks="blocks")], style=Drops)
    with pytest.raises(MisconfigurationException, match="none after the first 2 ran"):
        grow([LayerGrowth(at="step:2", to=4, blocks="blocks")], style=Drops, max_epochs=20)
