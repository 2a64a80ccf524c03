"""Optimizer state across edits, for every optimizer of torch and timm, and groups sorted by name."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm.optim
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from lightning_peft.structure import carry, edits, width
from lightning_peft.structure.depth import blocks_edit
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.structure.width_map import Layer, WidthMap
from lightning_peft.structure.width_state import carry_optimizer_state
from lightning_peft.testing.trace import difference
from lightning_peft.weights.maps import plain_tensors

# LBFGS has tests of its own, SparseAdam takes sparse gradients only.
# Of timm's, AdaHessian needs create_graph in backward, and Kron draws from a generator of its own that it does not save.
NOT_EXACT = {"timm:kron", "timm:kronc", "timm:kronw"}
TORCH = [
    name
    for name, cls in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(cls, Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
]


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """Kron compiles its own functions, which takes half a minute and has nothing to do with its state."""
    with torch.compiler.set_stance("force_eager"):
        yield


def timm_names() -> list[str]:
    """Optimizers that can be built here; some need apex or bitsandbytes."""
    found = []
    for name in timm.optim.list_optimizers(exclude_filters=["adahessian"]):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                build(f"timm:{name}")([nn.Parameter(torch.randn(4, 4))])
        except (ImportError, ModuleNotFoundError, RuntimeError, AssertionError):
            continue
        found.append(f"timm:{name}")
    return found


def build(name: str) -> Callable[[Any], Optimizer]:
    if name.startswith("timm:"):
        return lambda parameters: timm.optim.create_optimizer_v2(
            list(parameters), opt=name.removeprefix("timm:"), lr=1e-3, weight_decay=0.0
        )
    if name == "Muon":  # matrices only
        return lambda parameters: torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=1e-3)
    return lambda parameters: getattr(torch.optim, name)(list(parameters), lr=1e-3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 6), nn.Sequential(*blocks), nn.Linear(6, 2))


def steps(net: nn.Module, optimizer: Optimizer, count: int = 3, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = net(torch.randn(8, 6, generator=draw)).square().mean()
            loss.backward()
            return loss

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what old optimizers call is deprecated
            optimizer.step(closure)


def grown(net: nn.Module, optimizer: Optimizer) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    old = plain_tensors(net)
    change = edits.apply(net, blocks_edit(net, "1", [0, 1, 0, 1]))
    pairs = {n: (t, old[s]) for n, t in plain_tensors(net).items() if (s := change.source(n)) is not None}
    carry.join([optimizer], [], pairs)  # type: ignore[arg-type]
    return pairs  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("name", [*TORCH, *timm_names()])
def test_depth(name: str) -> None:
    net = network()
    optimizer = build(name)(net.parameters())
    steps(net, optimizer)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    pairs = grown(net, optimizer)
    carry.copy_states([optimizer], pairs)
    for new, source in pairs.values():
        if id(source) in trained:
            assert difference(dict(optimizer.state[source]), dict(optimizer.state[new])) is None
    if name in NOT_EXACT:
        return
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(net)
    steps(net, optimizer, 2, seed=1)
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    # A new optimizer on the grown network, groups sorted by name, goes on in the same way.
    again = build(name)(weights.parameters())
    carry.regroup(weights, [again], [], carry.group_names(net, [optimizer]))
    again.load_state_dict(saved)
    steps(weights, again, 2, seed=1)
    assert difference(dict(net.state_dict()), dict(weights.state_dict())) is None


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("name", [*TORCH, "LBFGS"])
def test_a_removed_block_leaves_the_optimizer(name: str) -> None:
    net = network()
    optimizer = build(name)(net.parameters())
    steps(net, optimizer)
    change = edits.apply(net, blocks_edit(net, "1", [1]))
    carry.leave([optimizer], [parameter for block in change.removed.values() for parameter in block.parameters()])
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(net)
    steps(net, optimizer, 2, seed=1)
    again = build(name)(weights.parameters())
    carry.regroup(weights, [again], [], carry.group_names(net, [optimizer]))
    again.load_state_dict(saved)
    steps(weights, again, 2, seed=1)
    assert difference(dict(net.state_dict()), dict(weights.state_dict())) is None


HIDDEN = WidthMap({"hidden": 6}, {"0": Layer(output="hidden"), "2": Layer(input="hidden"), "1.*": None})


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("name", [*TORCH, *timm_names()])
@pytest.mark.parametrize("rule", ["copy", "pad"])
def test_width(name: str, rule: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = build(name)(net.parameters())
    steps(net, optimizer)
    edit = width_edit(net, "", HIDDEN, {"hidden": 9})
    width.resize(net, edit)
    refusals: list[str] = []
    for parameter_name, parameter in net.named_parameters():
        if parameter_name in edit["tensors"] and parameter in optimizer.state:
            try:
                carry_optimizer_state(optimizer.state[parameter], edit, parameter_name, rule)
            except MisconfigurationException as error:
                refusals.append(str(error))
    assert all("reset" in message for message in refusals)
    if not refusals:
        before = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
        steps(net, optimizer, 1)
        assert all((p - then).abs().max() > 0 for p, then in before.items()), "not all are trained on"


def test_lbfgs_begins_anew() -> None:
    net = network()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1)
    steps(net, optimizer)
    grown(net, optimizer)
    carry.reset_states([optimizer])
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    before = net(inputs).square().mean()
    steps(net, optimizer, 2)
    assert net(inputs).square().mean() < before


def test_reset_is_a_new_optimizer() -> None:
    for name in [*TORCH, *(name for name in timm_names() if name not in NOT_EXACT), "timm:lookahead_lamb"]:
        torch.manual_seed(0)
        net = network()
        optimizer = build(name)(net.parameters())
        steps(net, optimizer)
        carry.reset_states([optimizer])
        twin = copy.deepcopy(net)
        fresh = build(name)(twin.parameters())
        for net_now, optimizer_now in ((net, optimizer), (twin, fresh)):
            torch.manual_seed(1)
            steps(net_now, optimizer_now, 2)
        assert difference(dict(net.state_dict()), dict(twin.state_dict())) is None, name


class Counts(torch.optim.SGD):
    """Counts its steps at all the places where optimizers do, and slows down by each."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.taken = 0
        self.state["taken"] = 0  # type: ignore[index]
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure: Any = None) -> Any:
        counts = (self.taken, self.state["taken"], *(g[key] for g in self.param_groups for key in ("k", "late") if key in g))
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] /= 1 + sum(counts)
            group["k"] += 1
            group["late"] = group.get("late", 0) + 1
        super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        self.taken += 1
        self.state["taken"] += 1  # type: ignore[index, operator]


def test_a_reset_finds_counters_without_knowing_their_names_and_leaves_hyperparameters() -> None:
    net = network()
    names = dict(net.named_parameters())
    first, *others = names.values()
    optimizer = Counts([{"params": [first], "lr": 0.5, "mine": 3}, {"params": others, "lr": 0.2, "initial_lr": 0.4}])
    steps(net, optimizer, 4)
    carry.reset_states([optimizer])
    notes = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    assert [(note["lr"], note.get("mine"), note.get("initial_lr")) for note in notes] == [(0.5, 3, None), (0.2, None, 0.4)]
    assert [("late" in note, note["k"]) for note in notes] == [(False, 0), (False, 0)]
    assert (optimizer.taken, optimizer.state["taken"]) == (0, 0)  # type: ignore[index]


def test_regroup_follows_names_not_positions() -> None:
    """Equally shaped states land on the wrong parameters without a word when they are restored by position."""
    net = network()
    first = torch.optim.AdamW([net[2].weight, net[0].weight, net[0].bias, *net[1].parameters(), net[2].bias])
    names = carry.group_names(net, [first])
    second = torch.optim.AdamW(net.parameters())
    schedule = lr_scheduler.LambdaLR(second, lambda step: 1.0)
    carry.regroup(net, [second], [schedule], names)
    assert carry.group_names(net, [second]) == names
    assert names[0][0][0] == "2.weight"


def test_regroup_with_fewer_groups_than_now() -> None:
    """Rates by layer: the grown network has more groups than the one that was grown."""
    net = network()
    grown_net = copy.deepcopy(net)
    before = [{"params": [*net[1][0].parameters(), *net[1][1].parameters()], "lr": 0.2}]
    names = carry.group_names(net, [torch.optim.SGD(before, lr=0.1)])
    now = torch.optim.SGD([{"params": block.parameters(), "lr": 0.1 * n} for n, block in enumerate(grown_net[1])], lr=0.1)
    schedule = lr_scheduler.CosineAnnealingLR(now, 10)
    carry.regroup(grown_net, [now], [schedule], names)
    assert carry.group_names(grown_net, [now]) == names
    assert len(schedule.base_lrs) == 1
    now.step()
    schedule.step()


def test_regroup_says_which_parameter_is_missing() -> None:
    net = network()
    names = carry.group_names(net, [torch.optim.SGD(net.parameters(), lr=0.1)])
    with pytest.raises(MisconfigurationException, match=r"0\.bias is not trained now and was.*same parameters"):
        carry.regroup(net, [torch.optim.SGD([p for n, p in net.named_parameters() if n != "0.bias"], lr=0.1)], [], names)
    with pytest.raises(MisconfigurationException, match="saved with 1 optimizers, configure_optimizers returned 0"):
        carry.regroup(net, [], [], names)


def test_named_parameters_stay_named() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    grown(net, optimizer)
    assert "1.2.0.weight" in optimizer.param_groups[0]["param_names"]
    again = torch.optim.SGD(net.named_parameters(), lr=0.1)
    carry.regroup(net, [again], [], carry.group_names(net, [optimizer]))
    assert again.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]
