from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_peft
from lightning_peft import split_low_rank
from lightning_peft.measure.flop_count import FlopCount
from lightning_peft.weights.low_rank import Scheme, as_matrix, from_matrix


def lower(layer: nn.Module, rank: int, scheme: Scheme) -> nn.Module:
    """Give a layer's weight a rank."""
    with torch.no_grad():
        weight: Any = layer.weight
        u, sigma, v = torch.linalg.svd(as_matrix(weight, scheme), full_matrices=False)
        weight.copy_(from_matrix((u[:, :rank] * sigma[:rank]) @ v[:rank], weight.shape, scheme))
    return layer


CASES = [
    ("channel", nn.Linear(12, 10), (4, 12)),
    ("spatial", nn.Linear(12, 10, bias=False), (4, 12)),
    ("channel", nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    ("channel", nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 9)),
    ("channel", nn.Conv2d(6, 8, 3, padding="same", dilation=2, bias=False), (2, 6, 9, 9)),
    ("channel", nn.Conv3d(3, 8, 3, padding=1), (2, 3, 5, 5, 5)),
    ("spatial", nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 9)),
    ("spatial", nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(0, 2)), (2, 6, 9, 9)),
    ("spatial", nn.Conv2d(6, 8, 3, padding="same", dilation=(1, 2)), (2, 6, 9, 9)),
    ("spatial", nn.Conv2d(6, 8, 5, stride=2, padding=2, padding_mode="circular"), (2, 6, 9, 9)),
    ("spatial", nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 9)),
]


@pytest.mark.parametrize(("scheme", "layer", "shape"), CASES, ids=lambda case: str(case)[:60])
def test_a_split_layer_computes_the_same_with_fewer_operations(
    scheme: Scheme, layer: nn.Module, shape: tuple[int, ...]
) -> None:
    net = nn.Sequential(lower(copy.deepcopy(layer), 2, scheme), nn.ReLU()).double()
    inputs = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with FlopCount() as before:
        expected = net(inputs)
    assert split_low_rank(net, scheme=scheme) == {"0": 2}
    with FlopCount() as after:
        torch.testing.assert_close(net(inputs), expected)
    assert after.total < before.total


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_operations_are_counted_as_they_run(scheme: Scheme) -> None:
    """Split at the largest rank that pays by our count, whole at the next: FLOPs agree on both sides."""
    inputs = torch.randn(1, 6, 16, 16)
    with FlopCount() as whole:
        nn.Conv2d(6, 8, 3, stride=2, padding=1)(inputs)
    for rank in range(1, 9):
        split = nn.Sequential(lower(nn.Conv2d(6, 8, 3, stride=2, padding=1), rank, scheme))
        forced = copy.deepcopy(split)
        done = split_low_rank(split, scheme=scheme)
        split_low_rank(forced, scheme=scheme, ranks={"0": rank})
        with FlopCount() as two:
            forced(inputs)
        assert bool(done) == (two.total < whole.total), rank


def test_what_is_of_full_rank_or_read_by_others_stays_whole() -> None:
    net = nn.ModuleDict(
        {
            "full": nn.Linear(8, 8),
            "grouped": lower(nn.Conv2d(8, 8, 3, groups=2), 1, "channel"),
            "attention": nn.MultiheadAttention(8, 2),
        }
    )
    lower(net["attention"].out_proj, 1, "channel")
    before = list(net.state_dict())
    assert split_low_rank(net) == {}
    assert list(net.state_dict()) == before


def test_a_new_instance_takes_the_structure_and_the_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Conv2d(2, 4, 3)
            self.alias = self.a

        def forward(self, inputs: Tensor) -> Tensor:
            output: Tensor = self.alias(self.a(inputs))
            return output

    net = Net().eval()
    lower(net.a, 1, "channel").requires_grad_(False)
    inputs = torch.randn(3, 8)
    expected = net(inputs)
    ranks = split_low_rank(net, exclude="b")
    assert ranks == {"a": 1}
    assert net.alias is net.a, "one layer in two places is one pair in two places"
    assert not net.a[1].training
    assert not any(p.requires_grad for p in net.a.parameters())
    torch.testing.assert_close(net(inputs), expected)
    twin = Net()
    assert split_low_rank(twin, ranks=ranks) == ranks
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(twin(inputs), expected)


def test_transposed_linear_layers_of_transformers() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = lower(conv1d(10, 8), 2, "channel")
    nn.init.normal_(layer.bias)
    net, inputs = nn.Sequential(layer), torch.randn(2, 3, 8)
    expected = net(inputs)
    assert split_low_rank(net) == {"0": 2}
    torch.testing.assert_close(net(inputs), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "network"}, "choose one of channel, spatial"),
        ({"ranks": {"nowhere": 1}}, "does not have"),
        ({"ranks": {"1": 1}}, "a ReLU, which cannot be split"),
        ({"ranks": {"0": 9}}, "has 8 singular values"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_and_nothing_changes(arguments: dict[str, Any], message: str) -> None:
    net = nn.Sequential(lower(nn.Linear(8, 8), 1, "channel"), nn.ReLU())
    with pytest.raises(MisconfigurationException, match=message):
        split_low_rank(net, **arguments)
    assert isinstance(net[0], nn.Linear)


def test_weights_that_cannot_be_decomposed_or_are_under_maps_are_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    nn.init.constant_(net[0].weight, torch.nan)
    with pytest.raises(MisconfigurationException, match="is not finite"):
        split_low_rank(net)
    mapped = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)))
    with pytest.raises(MisconfigurationException, match="under weight maps"):
        split_low_rank(mapped)
    assert lightning_peft.split_low_rank is split_low_rank
