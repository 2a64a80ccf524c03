"""What the dependency graph gets wrong is found out before anything is cut, and the rest is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from structured_networks import CONCATENATED, IMAGES, NETWORKS, RECURRENT, Moved, build, channels
from torch import Tensor, nn

from lightning_peft import StructuredPruning
from lightning_peft.structure.coupled.example import example_form, record
from lightning_peft.structure.coupled.units import Coupled
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Conv
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft_plugins.pruning._structured_pruning.cut_proof import CutProof

pytest.importorskip("torch_pruning")


def names(network: nn.Module, inputs: Tensor) -> set[str]:
    return {group.name for group in channels(network, inputs).groups}


def turned(group: Coupled) -> Coupled:
    """The group with its reader's columns one unit on: what a forward that rolls its channels makes of a right one."""
    places = [replace(p, units=p.units.roll(len(p.units) // group.units)) if p.dim == 1 else p for p in group.places]
    return replace(group, places=places)


@pytest.mark.parametrize("name", [*NETWORKS, *CONCATENATED])
def test_nothing_is_left_whole_that_the_graph_gets_right(name: str) -> None:
    network, inputs = build(name)
    assert set(channels(network, inputs).whole.values()) == {"they are what the network returns"}


@pytest.mark.parametrize("way", Moved.WAYS)
def test_channels_that_are_moved_stay_and_the_others_go(way: str) -> None:
    network, inputs = build(way)
    assert names(network, inputs) == {"stem.0", "reader"} | ({"moved"} if way == "not" else set())


@pytest.mark.parametrize("name", RECURRENT)
def test_what_a_recurrent_layer_reads_stays_and_what_reads_it_goes(name: str) -> None:
    network, inputs = build(name)
    found = channels(network, inputs)
    assert [group.name for group in found.groups] == ["after"]
    assert "first.0: " in found.left_whole()


def test_concatenated_parts_go_one_by_one() -> None:
    groups = {group.name: group for group in channels(*build("unet")).groups}
    read = {name: [p.units.tolist() for p in group.places if p.tensor == "after.0.weight"] for name, group in groups.items()}
    assert read["up"] == [[*range(6), *[-1] * 8]]
    assert read["outer.0"] == [[*[-1] * 6, *range(8)]]
    group = next(group for group in channels(*build("with input")).groups if group.name == "stem.0")
    assert next(p.units.tolist() for p in group.places if p.tensor == "last.0.weight") == [*[-1] * 3, *range(8)]


def test_halves_lose_alike() -> None:
    groups = channels(*build("c2f")).groups
    group = next(group for group in groups if any(place.tensor == "first.0.weight" and place.written for place in group.places))
    assert group.units == 8
    places = {(place.tensor, place.dim): place.units.tolist() for place in group.places}
    assert places["first.0.weight", 0] == [*range(8)] * 2
    assert places["last.0.weight", 1] == [*range(8)] * 4  # both halves, and the sums of the second with each block


@pytest.mark.parametrize("wrong", [[0], [2], [0, 1], [1, 3], [0, 2, 3]])
def test_wrong_groups_are_found_among_right_ones(wrong: Sequence[int]) -> None:
    network = nn.Sequential(*[part for width in (7, 6, 5, 8) for part in (nn.LazyLinear(width), nn.ReLU())], nn.LazyLinear(3))
    inputs = torch.randn(2, 4)
    network(inputs)
    groups = [turned(group) if at in wrong else group for at, group in enumerate(channels(network, inputs).groups)]
    failing = CutProof(network, "", record((inputs,), {})).failing(groups)
    assert list(failing) == [groups[at].name for at in wrong]


def test_right_groups_cost_two_calls_of_the_network_for_each_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = build("vgg")
    groups, proof = channels(network, inputs).groups, CutProof(network, "", record((inputs,), {}))
    call, calls = proof.drawn.output, []
    monkeypatch.setattr(proof.drawn, "output", lambda *called: calls.append(called) or call(*called))
    assert proof.failing(groups) == {}
    assert len(calls) == 6


def test_weights_that_hide_a_wrong_column_do_not_help_it() -> None:
    network, inputs = build("flip")
    with torch.no_grad():
        network.head.weight.zero_()
        network.reader.weight.copy_(network.reader.weight[:1].clone())
    assert "moved" not in names(network, inputs)


def test_saturated_probabilities_do_not_hide_a_wrong_column() -> None:
    class Saturated(Moved):
        def forward(self, inputs: Tensor) -> Tensor:
            return (1e3 + super().forward(inputs)).sigmoid()

    assert names(Saturated("flip"), IMAGES) == {"stem.0", "reader"}
    assert names(Saturated("not"), IMAGES) == {"stem.0", "moved", "reader"}


def test_a_layer_in_two_places_comes_out_of_a_proof_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    network.insert(3, network[2])
    inputs = torch.randn(2, 4)
    proof = CutProof(network, "", record((inputs,), {}))
    before = {name: value.clone() for name, value in proof.whole.state_dict().items()}
    assert proof.failing(channels(network, inputs).groups) == {}
    assert proof.whole[2].weight is proof.whole[3].weight
    assert all(torch.equal(value, before[name]) for name, value in proof.whole.state_dict().items())


def test_sizes_written_into_a_forward_that_divide_half_of_the_channels_are_found_out() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            maps = self.first(inputs)
            return self.head(self.second(maps.mean((2, 3)).view(-1, 4, maps.shape[1] // 4).flatten(1)).relu())

    assert names(Fixed(), IMAGES) == {"second"}


def test_what_an_activation_makes_of_zero_does_not_matter() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 6), nn.Softplus(), nn.Linear(6, 3))
    assert names(network, torch.randn(2, 4)) == {"0", "2"}


@pytest.mark.parametrize(("norm", "exact"), [("l2", True), ("softmax", False), ("mean", False)])
def test_what_mixes_channels_is_cut_where_zeros_are_as_good_as_nothing(norm: str, exact: bool) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            found = self.first(inputs).relu()
            mixed = {"l2": nn.functional.normalize, "softmax": lambda x: x.softmax(-1), "mean": lambda x: x - x.mean(-1, True)}
            return self.head(self.second(mixed[norm](found)).relu())

    assert names(Mixing(), torch.randn(2, 4)) == ({"first", "second"} if exact else {"second"})


def test_norms_of_any_class_run_on_what_stays() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(8))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.gain * inputs / inputs.square().mean(-1, keepdim=True).sqrt()

    network = nn.Sequential(
        nn.Linear(4, 8), Scaled(), nn.Linear(8, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 3)
    )
    assert names(network, torch.randn(2, 4)) == {"0", "2"}


def test_with_nothing_left_it_is_refused_and_the_reason_comes_first() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (6, 1)), nn.ChannelShuffle(2), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(
        MisconfigurationException, match=r"Nothing of Sequential can be cut in channels and heads\. 0: the network"
    ):
        channels(network, torch.randn(2, 4))


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_training_says_what_stays_and_cuts_the_rest() -> None:
    class Flipped(Conv):
        def build(self) -> None:
            super().build()
            self.model.append(nn.Sequential(nn.Linear(3, 6), Flip(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))

    class Flip(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.flip(1)

    with pytest.warns(UserWarning, match=r"structured_pruning leaves whole .*\.0: the network without some of them does not"):
        run = fit([StructuredPruning(0.3, start=2)], style=Flipped)
    assert run.module.model[-1][0].out_features == 6
    assert sum(p.numel() for p in run.module.parameters()) < 0.71 * sum(p.numel() for p in Flipped().parameters())


@pytest.mark.filterwarnings("ignore:structured_pruning leaves whole:UserWarning")
def test_what_failed_once_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shuffled(Conv):
        def build(self) -> None:
            super().build()
            self.model.append(nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (6, 1)), nn.ChannelShuffle(2), nn.Flatten()))
            self.model.append(nn.Linear(6, 3))

    counts, fault = [], CutProof._fault

    def counted(proof: CutProof, groups: Sequence[Coupled]) -> str | None:
        counts.append(len(groups))
        return fault(proof, groups)

    def cuts() -> StructuredPruning:
        return StructuredPruning(0.4, start=4, end=8, every=2, shape="linear")

    monkeypatch.setattr(CutProof, "_fault", counted)
    whole = fit([cuts()], style=Shuffled, max_epochs=3, after=[every_epoch(tmp_path)])
    assert len(counts) > 3  # all of them, which one, and the rest
    assert counts[-3:] == [counts[0] - 1] * 3  # before each of the cuts at 4 (of nothing), 6 and 8
    del counts[:]
    resumed = fit([cuts()], style=Shuffled, max_epochs=3, seed=5, resume=tmp_path / "epoch=1.ckpt")
    assert len(counts) == 1
    assert_same(whole, resumed, "uninterrupted against resumed")


def test_operations_that_torch_pruning_divides_by_zero_for_do_not_end_it() -> None:
    models = pytest.importorskip("torchvision").models
    network = models.ShuffleNetV2([1, 1, 1], [8, 16, 24, 32, 40], num_classes=5)
    assert {"conv1.0", "stage2.0.branch2.3", "conv5.0"} <= names(network, torch.randn(1, 3, 64, 64))


def test_a_state_of_an_earlier_version_loads() -> None:
    method = StructuredPruning()
    state = method.state()
    del state["failed"]
    assert method.state_form(None)(state, "") is None
    method.load_state(state)
    assert method.state()["failed"] == {}
    assert "failed" in str(method.state_form(None)(state | {"failed": {"0": 1}}, ""))


def test_a_record_of_an_earlier_version_has_no_range() -> None:
    network, inputs = build("vgg")
    example = record((inputs,), {})
    del example["args"][0]["range"]
    assert example_form(example, "") is None
    assert CutProof(network, "", example).failing(channels(network, inputs).groups) == {}
    damaged = record((inputs,), {})
    damaged["args"][0]["range"] = [0.0, float("nan")]
    assert "range" in str(example_form(damaged, ""))


def test_what_is_returned_beside_the_prediction_stays_too() -> None:
    class Telling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            hidden = self.second(self.first(inputs).relu()).relu()
            return {"logits": self.head(hidden), "hidden": hidden}

    found = channels(Telling(), torch.randn(2, 4))
    assert [group.name for group in found.groups] == ["first"]
    assert found.left_whole() == ""


def test_what_no_number_comes_out_of_is_refused() -> None:
    class Silent(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) * float("nan")

    with pytest.raises(MisconfigurationException, match=r"cannot be proven.*no finite real number.*network="):
        channels(nn.Sequential(nn.Linear(4, 4), Silent(4, 2)), torch.randn(2, 4))
