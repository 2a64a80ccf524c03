"""SpIEL: what is dropped and grown, Adam with ages, and that only the chosen coordinates cost state."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn

import lightning_peft
from lightning_peft import NMSparsity, Run, SpIEL
from lightning_peft.functional import is_nm, reallocated, seeded_moments
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft_plugins.selective._shared.whole_gradients import WholeGradients
from lightning_peft_plugins.selective._spiel.aged_adam import AgedAdam
from lightning_peft_plugins.selective._spiel.candidates import candidates_form

LAYERS = ("model.0", "model.2")


class Sparse:
    """A weight and what it gains, all dense, with a set of coordinates that are trained: written from the paper."""

    def __init__(self, weight: Tensor, name: str, count: int) -> None:
        self.weight, self.base = weight, weight.detach().clone()
        seed = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(f"spiel/{name}.weight".encode()))
        self.active = set(torch.randperm(weight.numel(), generator=seed)[:count].tolist())
        self.delta, self.first, self.second, self.age = (torch.zeros(weight.numel()) for _ in range(4))
        self.seen: list[Tensor] = []

    def step(self, gradient: Tensor, lr: float, watched: bool) -> None:
        gradient = gradient.flatten()
        if watched:
            self.seen.append(gradient)
        for i in self.active:
            self.age[i] += 1
            self.first[i] = 0.9 * self.first[i] + 0.1 * gradient[i]
            self.second[i] = 0.999 * self.second[i] + 0.001 * gradient[i] ** 2
            size = (self.second[i] / (1 - 0.999 ** self.age[i])).sqrt() + 1e-8
            self.delta[i] -= lr * self.first[i] / (1 - 0.9 ** self.age[i]) / size
        self.write()

    def write(self) -> None:
        self.weight.copy_(self.base + self.delta.view_as(self.base))

    def reallocate(self, share: float) -> None:
        order = sorted(self.active, key=lambda i: float(self.delta[i].abs()))
        outgoing = order[: int(len(order) * share)]
        staying = self.active - set(outgoing)
        total = torch.stack(self.seen).sum(0)
        candidates = self.seen[0].abs().topk(len(order)).indices.tolist()
        valid = sorted((i for i in candidates if i not in staying), key=lambda i: -float(total[i].abs()))
        incoming = valid[: len(outgoing)]
        both = set(outgoing) & set(incoming)
        incoming = [i for i in incoming if i not in both]
        outgoing = [i for i in outgoing if i not in both][: len(incoming)]
        self.delta[outgoing] = 0
        self.active = self.active - set(outgoing) | set(incoming)
        steps = len(self.seen)
        squares = torch.stack(self.seen).square().sum(0)
        for i in incoming:
            self.age[i] = steps
            self.first[i] = total[i] / steps * (1 - 0.9**steps)
            self.second[i] = squares[i] / steps * (1 - 0.999**steps)
        self.seen = []
        self.write()


def sparse_by_hand(task: Task) -> None:
    module, every, window, rate = task.module, 4, 2, 0.5
    weights = [Sparse(module.get_submodule(name).weight, name, 25) for name in LAYERS]
    for step, batch in enumerate(task.batches):
        gradients = torch.autograd.grad(task.loss(batch), [each.weight for each in weights])
        with torch.no_grad():
            for each, gradient in zip(weights, gradients, strict=True):
                each.step(gradient, module.lr, step % every < window)
                if (step + 1) % every == window:
                    each.reallocate(1.0 if step < every else rate * (1 - (step + 1) / len(task.batches)))


class TestSpIEL(MethodTester):
    methods = [
        lambda: SpIEL(density=0.1, every=4, window=2, rate=0.5, checkpoint="full"),
        lambda: SpIEL(density=0.2, every=3, window=1, tune=("head",), targets="all-weights", checkpoint="full"),
    ]
    references = [Reference(sparse_by_hand, tolerance=2e-5)]


def test_the_smallest_values_go_and_the_largest_gradients_come() -> None:
    values, indices = torch.tensor([0.5, -0.1, 2.0, 0.2]), torch.tensor([2, 3, 7, 9])
    candidates, gradients = torch.tensor([1, 3, 7, 8]), torch.tensor([-4.0, 5.0, 9.0, 1.0])
    # 3 and 9 would go; 7 stays, so of 3, 1, 8 the first two would come; 3 goes and comes, so 9 alone makes place for 1.
    slots, places = reallocated(values, indices, candidates, gradients, 2)
    assert (indices[slots].tolist(), candidates[places].tolist()) == ([9], [1])
    slots, places = reallocated(values, indices, candidates, gradients, 0)
    assert len(slots) == len(places) == 0
    slots, places = reallocated(values, indices, torch.tensor([2, 3]), torch.tensor([1.0, 1.0]), 1)
    assert len(slots) == len(places) == 0, "no candidate is valid but the one that would go"


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 1000))
@settings(deadline=None)
def test_coordinates_stay_as_many_and_different(count: int, going: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    indices, candidates = (torch.randperm(30, generator=draw)[:count].sort().values for _ in range(2))
    values, gradients = torch.randn(2, count, generator=draw)
    going = min(going, count)
    slots, places = reallocated(values, indices, candidates, gradients, going)
    assert len(slots) == len(places) <= going
    after = indices.clone()
    after[slots] = candidates[places]
    assert len(set(after.tolist())) == count
    smallest = values.abs().sort().values[:going]
    assert all(values[slot].abs() in smallest for slot in slots)


def test_moments_that_are_corrected_give_what_was_seen() -> None:
    """After another step with the mean as gradient, Adam's corrected moments are the mean and the mean of squares."""
    gradients, betas = torch.tensor([[1.0, -2.0], [3.0, -1.0], [2.0, 0.0]]), (0.9, 0.95)
    total, squares = gradients.sum(0), gradients.square().sum(0)
    first, second = seeded_moments(total, squares, 3, betas)
    first = 0.9 * first + 0.1 * total / 3
    second = 0.95 * second + 0.05 * squares / 3
    torch.testing.assert_close(first / (1 - 0.9**4), torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(second / (1 - 0.95**4), squares / 3)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_while_all_are_of_one_age_it_is_adam(kind: Any, decay: float) -> None:
    draw = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(4, generator=draw), torch.randn(6, 4, generator=draw)
    mine, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    other, same = (nn.Parameter(start.clone()) for _ in range(2))
    age = torch.zeros(4)
    optimizer = AgedAdam(kind([mine, other], lr=0.1, weight_decay=decay), lambda: {mine: age})
    plain = kind([theirs, same], lr=0.1, weight_decay=decay)
    for gradient in gradients:
        for parameter in (mine, other, theirs, same):
            parameter.grad = gradient.clone()
        optimizer.step()
        plain.step()
    torch.testing.assert_close(mine, theirs)
    assert torch.equal(other, same)
    assert torch.equal(mine.grad, gradients[-1])  # type: ignore[arg-type]
    assert age.tolist() == [6] * 4
    assert optimizer.state[mine].keys() == plain.state[theirs].keys()


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "fused"])
def test_forms_of_adam_without_room_for_ages_are_refused(option: str) -> None:
    class Own(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), **{option: True})

    with pytest.raises(MisconfigurationException, match=f"without {option}=True"):
        fit([SpIEL(density=0.1)], style=Own)


class Watch(Callback):
    """Coordinates, weights, and the optimizer's tensors after every step."""

    def __init__(self, method: SpIEL) -> None:
        self.method = method
        self.indices: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.bytes: list[int] = []
        self.dense: list[bool] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.dense.append(pl_module.model[2]._parameters["weight"].requires_grad)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        [(_, values)] = [each for each in self.method.maps(pl_module) if each[0].name == "model.2.weight"]
        self.indices.append(values.indices.clone())
        self.weights.append(pl_module.model[2].weight.detach().clone())
        states = trainer.optimizers[0].state.values()
        self.bytes.append(sum(state[key].numel() * 4 for state in states for key in ("exp_avg", "exp_avg_sq")))


def test_only_the_chosen_coordinates_move_and_cost_state() -> None:
    torch.manual_seed(0)
    module = Plain()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    method = SpIEL(density=0.1, every=4, window=2, rate=0.5)
    watch = Watch(method)
    fit([method], module=module, after=[watch], max_epochs=3)
    for indices, weight in zip(watch.indices, watch.weights, strict=True):
        assert len(indices) == 25
        outside = torch.ones(256, dtype=torch.bool)
        outside[indices] = False
        assert torch.equal(weight.flatten()[outside], before["model.2.weight"].flatten()[outside])
    moved = [step for step in range(11) if not torch.equal(watch.indices[step], watch.indices[step + 1])]
    assert set(moved) <= {0, 4, 8}, "the windows end after the steps 2, 6 and 10"
    assert 0 in moved
    assert watch.bytes == [2 * 4 * 2 * 25] * 12
    assert sum(len(age) for age in method._ages.values()) == 50
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["model.0.weight", "model.2.weight"]
    assert all(p.requires_grad for p in module.parameters())


def test_weights_have_gradients_in_windows_alone() -> None:
    method = SpIEL(density=0.1, every=4, window=2)
    watch = Watch(method)
    fit([method], after=[watch], max_epochs=2)
    assert watch.dense == [True, True, False, False] * 2


def test_what_was_frozen_before_is_frozen_again() -> None:
    class Based(Plain):
        def build(self) -> None:
            super().build()
            self.model[0].requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return self.make_optimizer([p for p in self.parameters() if p.requires_grad])

    module = fit([SpIEL(density=0.1, every=4, window=2)], style=Based).module
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"model.0.weight", "model.0.bias"}


def test_a_resume_in_a_window_knows_what_was_seen(tmp_path: Path) -> None:
    """Epochs of four steps, windows of three from every fifth step on: files are saved within the second and third."""

    def methods() -> list[Any]:
        return [SpIEL(density=0.1, every=5, window=4, rate=1.0, checkpoint="full")]

    run = fit(methods(), after=[every_epoch(tmp_path)], max_epochs=4)
    for epoch in range(3):
        resumed = fit(methods(), resume=tmp_path / f"epoch={epoch}.ckpt", seed=8, max_epochs=4)
        assert_same(run, resumed, f"uninterrupted against resumed after epoch {epoch}")
    assert torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]["lightning_peft/spiel"]["state"]["seen"]


def test_ages_are_counted_in_half_precision_too(tmp_path: Path) -> None:
    """Three hundred steps in bfloat16, whose whole numbers end at 256; and moments whose correction it rounds to nothing."""
    method = SpIEL(density=0.1, every=400, window=2)
    module = fit([method], after=[every_epoch(tmp_path)], max_epochs=75, precision="bf16-true").module
    assert all(value.isfinite().all() for value in module.state_dict().values())
    file = torch.load(tmp_path / "epoch=74.ckpt", weights_only=True)
    ages = file["callbacks"]["lightning_peft/spiel"]["state"]["ages"]["model.2.weight"]
    assert set(ages.tolist()) == {300.0}, "grown ones are as old as the window that they were seen in"
    assert file["optimizer_states"][0]["state"]


def test_masked_weights_grow_nothing() -> None:
    run = fit([SpIEL(density=0.2, every=4, window=2), NMSparsity("2:4", "one-shot", exclude=())], max_epochs=2)
    assert is_nm(run.module.model[2].weight, 2, 4)


def test_a_state_that_does_not_fit_is_refused() -> None:
    def seen(**changed: Any) -> dict[str, Any]:
        good = {"indices": torch.tensor([1, 3]), "total": torch.ones(2), "squares": torch.ones(2), "samples": 1}
        return {"fc": good | changed}

    form = candidates_form({"fc": torch.zeros(2, 2)})
    assert form(seen(), "state") is None
    for changed, message in (
        ({"indices": torch.tensor([1, 4])}, "outside of the weight"),
        ({"indices": torch.tensor([1])}, "not as many sums"),
        ({"indices": torch.tensor([1.0, 2.0])}, "no list of coordinates"),
        ({"samples": 0}, "samples"),
    ):
        assert message in str(form(seen(**changed), "state"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, "above 0 and at most 1"),
        ({"rate": 1.5}, "above 0 and at most 1"),
        ({"every": 5}, "window=5 must be at least 1 and below every=5"),
        ({"tune": "norms"}, "choose one of bias, norm, head"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        SpIEL(**arguments)


def test_a_layer_that_is_called_late_gets_no_candidates_before() -> None:
    class Late(Plain):
        def logits(self, inputs: Tensor) -> Tensor:
            net, self.calls = self.model, self.calls + 1
            hidden = net[:2](inputs)
            return net[3:](hidden if self.calls < 3 else net[2](hidden))  # type: ignore[no-any-return]

        calls = 0

    method = SpIEL(density=0.1, every=8, window=4)
    watch = Watch(method)
    fit([method], style=Late, after=[watch])
    assert not torch.equal(watch.indices[2], watch.indices[3])
    state = method._ages["model.2.weight"]
    assert 2.0 in state.tolist(), "grown coordinates are as old as the steps in which their layer was called"


def test_gradients_that_a_scaler_does_not_take_back_are_taken_back() -> None:
    weight, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    scaler = SimpleNamespace(get_scale=lambda: 8.0)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), optimizers=[torch.optim.SGD([weight])])
    run: Any = Run(trainer, nn.Module(), "", nn.Module())  # type: ignore[arg-type]
    assert (WholeGradients.scale(run, weight), WholeGradients.scale(run, other)) == (1.0, 8.0)
    trainer.precision_plugin = object()
    assert WholeGradients.scale(run, other) == 1.0


def test_files_hold_values_and_coordinates_alone(tmp_path: Path) -> None:
    class Pretrained(Plain):
        def build(self) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(7)
                super().build()

    def methods() -> list[Any]:
        return [SpIEL(density=0.1, every=4, window=2)]

    run = fit(methods(), style=Pretrained, after=[every_epoch(tmp_path)], max_epochs=3)
    assert not torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
    again = lightning_peft.load_from_checkpoint(Pretrained, tmp_path / "epoch=2.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(run.module.parameters(), again.parameters(), strict=True))
    resumed = fit(methods(), style=Pretrained, resume=tmp_path / "epoch=0.ckpt", seed=2, max_epochs=3)
    assert_same(run, resumed, "uninterrupted against resumed")


def test_what_no_layer_holds_is_named() -> None:
    net = nn.ModuleDict({"mix": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 3)})
    assert "6 of 64 weights in 1 layers, not mix.in_proj_weight" in str(lightning_peft.plan(net, [SpIEL(density=0.1)]))


def test_a_choice_that_never_came_is_told() -> None:
    with pytest.warns(UserWarning, match="before coordinates were chosen by their gradients, after step 5"):
        trainer(callbacks=[SpIEL()]).fit(Plain(), loader(), loader())
    trainer(callbacks=[SpIEL(window=4)]).fit(Plain(), loader(), loader())
    assert "50 of 512 weights in 2 layers" in str(lightning_peft.plan(Plain(), [SpIEL(density=0.1)]))
