"""Groups of weights that are pruned together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.network.nm_layers import input_dim
from lightning_peft.weights.groups import Grouping, parse_grouping

LAYERS = [nn.Linear(6, 10), nn.Conv2d(6, 10, 3), nn.ConvTranspose2d(6, 10, 3), nn.Conv1d(4, 5, 1)]
PATTERNS = ["unstructured", "channel", "block:4x4", "block:1x1", "block:3x100", "head:2", "head:4"]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_weight_is_in_one_group(pattern: str, layer: nn.Module) -> None:
    grouping, weight, dim = parse_grouping(pattern), layer.weight.detach(), input_dim(layer)
    sizes = grouping.sizes(weight.shape, dim)
    assert sizes.sum() == weight.numel()
    assert (sizes > 0).all()
    seen = torch.zeros_like(weight)
    for place in range(sizes.numel()):
        one = torch.zeros(sizes.numel(), dtype=torch.bool)
        one[place] = True
        mask = grouping.spread(one.view(sizes.shape), weight.shape, dim)
        assert mask.shape == weight.shape
        assert mask.is_contiguous()
        assert mask.sum() == sizes.flatten()[place]
        torch.testing.assert_close(weight[mask].mean(), grouping.scores(weight, dim).flatten()[place])
        seen += mask
    assert (seen == 1).all()


@given(rows=st.integers(0, 5), columns=st.integers(0, 5), whole=st.booleans())
def test_what_is_spread_comes_back(rows: int, columns: int, whole: bool) -> None:
    grouping, shape = Grouping(rows, columns, whole), torch.Size([7, 9, 2])
    kept = torch.rand(grouping.sizes(shape, 1).shape, generator=torch.Generator().manual_seed(rows + 7 * columns)) > 0.5
    mask = grouping.spread(kept, shape, 1)
    assert torch.equal(grouping.scores(mask.float(), 1) > 0.5, kept)


def test_channels_of_every_layout() -> None:
    kept = torch.tensor([True, False]).view(2, 1, 1)
    channel = parse_grouping("channel")
    assert channel.spread(kept, torch.Size([2, 3]), 1).tolist() == [[True] * 3, [False] * 3]
    assert channel.spread(kept, torch.Size([3, 2]), 0).tolist() == [[True, False]] * 3, (
        "transformers' Conv1D stores its transpose"
    )


@pytest.mark.parametrize("pattern", ["", "block:0x4", "block:4", "head:0", "row", "2:4"])
def test_unknown_patterns_are_refused_with_those_known(pattern: str) -> None:
    with pytest.raises(MisconfigurationException, match='"block:RxC"'):
        parse_grouping(pattern)
