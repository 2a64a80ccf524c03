"""Lists of blocks: which a rule takes, and that weight maps do not change what a block is."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from lightning_peft.network.block_lists import as_list, find_lists, is_equal, is_trunk, signature
from lightning_peft.weights.maps import attach_map
from lightning_peft_plugins.regularizers._weight_compander.maps import FittedCompanderMap


def block(width: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))


def found(network: nn.Module, name: str = "") -> tuple[list[str], list[str]]:
    return list(find_lists(network, is_equal, name)), list(find_lists(network, is_trunk, name))


def test_equal_lists_need_equal_entries_and_trunks_two_alike() -> None:
    equal, stage, mixed = ([block(), block()], [block(4), block(), block()], [block(), nn.Linear(2, 2)])
    network = nn.ModuleDict({"equal": nn.ModuleList(equal), "stage": nn.Sequential(*stage), "mixed": nn.Sequential(*mixed)})
    assert found(network) == (["equal"], ["equal", "stage"])
    assert found(network, "net") == (["net.equal"], ["net.equal", "net.stage"])
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))  # to be copied, but too small to be a block that leaves
    assert found(layers) == ([""], [])


def test_blocks_of_one_class_are_a_trunk_unless_the_lists_are_inside_them() -> None:
    class Stage(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([block(width), block(width)])

    class Unequal(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = block(width)

    assert found(nn.ModuleList([Stage(3), Stage(4)]))[1] == ["0.blocks", "1.blocks"]
    assert found(nn.ModuleList([Unequal(3), Unequal(4)])) == ([], [""])


def test_what_stands_twice_or_has_no_layers_is_no_block() -> None:
    shared = block()
    blocks = as_list(nn.ModuleList([shared, block(), shared, nn.ReLU(), nn.Linear(2, 2)]))
    assert blocks is not None
    assert blocks.blocks == [1]
    assert as_list(nn.ModuleDict()) is None


def test_a_block_under_weight_maps_is_the_block_it_was() -> None:
    network = nn.ModuleList([block(), block()])
    before = signature(network[0])
    attach_map(network, "0.2.weight", FittedCompanderMap(headroom=2.0, slope=1.0))
    assert "0.2.weight" not in network.state_dict()
    assert signature(network[0]) == before == signature(network[1])
    torch.nn.utils.parametrizations.weight_norm(network[1][0])
    assert signature(network[1]) != before


def test_lists_inside_a_list_that_was_found_are_not_found_again() -> None:
    inner = [nn.Sequential(block(), block()) for _ in range(2)]
    assert found(nn.ModuleDict({"outer": nn.ModuleList(inner)}))[0] == ["outer"]


def test_a_trunk_is_numbered() -> None:
    named = nn.Sequential()
    named.add_module("first", block())
    named.add_module("second", block())
    assert found(nn.ModuleDict({"named": named}))[1] == []


def test_a_list_that_leaves_places_empty_is_none_of_blocks() -> None:
    """scvi-tools writes Sequential(Linear, BatchNorm or None, Activation or None)."""
    network = nn.Sequential(OrderedDict(first=block(), second=block()))
    network.register_module("third", None)
    assert as_list(network) is None
    assert found(nn.ModuleDict({"holes": network, "blocks": nn.ModuleList([block(4), block(4)])}))[0] == ["blocks"]
