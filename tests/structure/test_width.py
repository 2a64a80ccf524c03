from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from width_toys import LAYERS, NET, Net, edit_of

from lightning_peft.compose.lanes import Lane
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.width import check_resize, resize, undo_resize
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.structure.width_map import Layer, Norm, WidthMap
from lightning_peft.weights.maps import WeightMap, attach_map, plain_tensors


class Holder(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.model = net


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def noted(module):
    """Every number and tuple that a module notes about itself."""
    kinds = (int, float, tuple)
    return {
        path: {key: value for key, value in vars(layer).items() if type(value) in kinds}
        for path, layer in module.named_modules()
    }


def test_a_resized_network_is_the_one_its_class_builds():
    net = Holder(Net())
    edit = edit_of(net.model, {"width": 10}, "model")
    check_resize(net, edit)
    resize(net, edit)
    fresh = Holder(Net(10, 15))
    assert shapes(net) == shapes(fresh)
    assert noted(net) == noted(fresh)
    net.model(torch.tensor([[1, 2]])).sum().backward()


def test_objects_and_ties_stay_and_gradients_go():
    net = Net()
    parameters = dict(net.named_parameters())
    net(torch.tensor([1])).sum().backward()
    resize(net, edit_of(net, {"width": 8}))
    assert all(dict(net.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert net.head.weight is net.embed.weight
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters.values())
    assert isinstance(net.embed.weight, nn.Parameter)


def test_undoing_loses_nothing():
    net = Net()
    before, numbers = copy.deepcopy(net.state_dict()), noted(net)
    edit = edit_of(net, {"width": 9, "ffn": 7})
    resize(net, edit)
    undo_resize(net, edit)
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert noted(net) == numbers
    check_resize(net, edit)


def test_a_graph_that_is_still_alive_does_not_disturb_the_next_backward():
    net = Net()
    alive = net(torch.tensor([1, 2])).sum()
    resize(net, edit_of(net, {"width": 8}))
    net(torch.tensor([1, 2])).sum().backward()
    assert net.up.weight.grad.shape == (12, 8)
    assert alive.grad_fn is not None


def test_hooks_on_parameters_stay():
    net, seen = Net(), []
    net.up.weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    net(torch.tensor([1])).sum().backward()
    resize(net, edit_of(net, {"width": 8}))
    net(torch.tensor([1])).sum().backward()
    assert seen == [(6, 4), (12, 8)]


def test_the_stored_tensor_under_a_weight_map_is_resized():
    class Double(WeightMap):
        kind, lane = "double", Lane.REPARAM

        def forward(self, weight):
            return 2 * weight

    net = Net()
    before = net.up.weight
    attach_map(net, "up.weight", Double())
    edit = edit_of(net, {"width": 8})
    assert edit["tensors"]["up.weight"]["to"] == [12, 8]
    check_resize(net, edit)
    resize(net, edit)
    assert net.up._parameters["weight"] is before
    assert net.up.weight.shape == (12, 8)
    assert (net.up.in_features, net.up.out_features) == (8, 12)


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ({"width": 3}, "at least 4"),
        ({"width": 4}, "Nothing grows"),
        ({"width": 4.0}, "whole number"),
        ({"width": True}, "whole number"),
        ({"depth": 4}, "width, ffn"),
        ({"width": 5}, "width=6, or ffn beside"),
        ({"width": 7}, "width=6 or width=8"),
    ],
)
def test_impossible_targets_are_refused_with_the_fix(to, says):
    with pytest.raises(MisconfigurationException, match=says):
        edit_of(Net(), to)


def heads(sizes, **options):
    tensors = {"q": (" ".join(label for label in ("kv_heads", "groups", "heads", "head_dim") if label in sizes),)}
    return WidthMap(sizes | {"width": 12}, {}, tensors, **options)


@pytest.mark.parametrize(
    ("to", "kv_heads", "groups"),
    [
        ({"width": 24}, 6, 2),
        ({"width": 24, "heads": 9}, 3, 3),
        ({"heads": 8}, 4, 2),
        ({"heads": 12, "kv_heads": 4}, 4, 3),
        ({"width": 24, "kv_heads": 3}, 3, 4),
    ],
)
def test_query_heads_grow_with_key_value_heads_or_within_their_groups(to, kv_heads, groups):
    net = nn.Module()
    net.q = nn.Parameter(torch.zeros(12))
    axes = width_edit(net, "", heads({"kv_heads": 3, "groups": 2, "head_dim": 2}), to)["axes"]
    assert (axes["kv_heads"], axes["groups"], axes["head_dim"]) == ([3, kv_heads], [2, groups], [2, 2])


def test_multi_query_attention_keeps_its_one_key_value_head():
    net = nn.Module()
    net.q = nn.Parameter(torch.zeros(12))
    axes = width_edit(net, "", heads({"kv_heads": 1, "groups": 6, "head_dim": 2}), {"width": 24})["axes"]
    assert (axes["kv_heads"], axes["groups"]) == ([1, 1], [6, 12])


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ({"heads": 7}, "multiple of 2 .* or of 3"),
        ({"kv_heads": 6}, "at least 2 heads each"),
        ({"head_dim": 4}, "cannot grow"),
        ({"width": 15}, "a head has 2. Give width=14 or width=16, or heads beside"),
    ],
)
def test_heads_that_do_not_fit_are_refused(to, says):
    net = nn.Module()
    net.q = nn.Parameter(torch.zeros(12))
    with pytest.raises(MisconfigurationException, match=says):
        width_edit(net, "", heads({"kv_heads": 3, "groups": 2, "head_dim": 2}), to)


def test_heads_must_span_the_width_where_the_class_demands_it():
    net = nn.Module()
    net.q = nn.Parameter(torch.zeros(12))
    width_map = heads({"heads": 3, "head_dim": 4}, demand="span")
    with pytest.raises(MisconfigurationException, match="Give width=24, or leave out heads"):
        width_edit(net, "", width_map, {"heads": 6})
    assert width_edit(net, "", width_map, {"width": 24})["axes"]["heads"] == [3, 6]


def test_unknown_tensors_are_listed():
    with pytest.raises(MisconfigurationException, match=r"does not know norm.weight, norm.bias of Net.*layers= or tensors="):
        width_edit(Net(), "", WidthMap(NET.sizes, {k: v for k, v in LAYERS.items() if k != "norm"}, NET.tensors), {"width": 8})


def test_a_map_that_does_not_fit_the_network_is_refused():
    with pytest.raises(MisconfigurationException, match="has the shape"):
        width_edit(Net(), "", WidthMap({"width": 5, "ffn": 5}, LAYERS, NET.tensors), {"width": 10})
    with pytest.raises(MisconfigurationException, match=r"network.words is 7; the width map says width = 4"):
        width_edit(Net(), "", WidthMap(NET.sizes, LAYERS, NET.tensors, {"": {"words": "width"}}), {"width": 8})
    with pytest.raises(MisconfigurationException, match="several ways"):
        width_edit(
            Net(),
            "",
            WidthMap(
                NET.sizes,
                {**LAYERS, "head": None, "embed": None},
                {**NET.tensors, "head.weight": ("", ""), "embed.weight": ("", "width")},
            ),
            {"width": 8},
        )


def test_layers_and_tensors_can_be_kept():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    edit = width_edit(
        net, "", WidthMap({"hidden": 4}, {"0": Layer(output="hidden"), "1": Layer(input="hidden")}), {"hidden": 5}
    )
    assert list(edit["tensors"]) == ["0.weight", "0.bias", "1.weight"]
    assert width_edit(net, "", WidthMap({"out": 4}, {"0": None, "1": Layer(output="out")}), {"out": 5})["inputs"] == {}


def test_a_user_declares_a_network_with_raw_weights():
    """``nn.MultiheadAttention`` holds its three projections as one parameter of its own."""

    def build(width, heads, ffn):
        return nn.TransformerEncoderLayer(width, heads, ffn, dropout=0.0, batch_first=True, norm_first=True)

    layer = build(8, 2, 12)
    width_map = WidthMap(
        sizes={"width": 8, "heads": 2, "head_dim": 4, "ffn": 12},
        layers={
            "self_attn.out_proj": Layer("heads head_dim", "width"),
            "linear1": Layer("width", "ffn"),
            "linear2": Layer("ffn", "width"),
            "norm?": Norm(),
        },
        tensors={"self_attn.in_proj_*": Layer("width", "3 heads head_dim")},
        attributes={"self_attn": {"embed_dim": "width", "kdim": "width", "vdim": "width", "num_heads": "heads"}},
        demand="span",
    )
    edit = width_edit(layer, "", width_map, {"width": 16})
    assert edit["tensors"]["self_attn.in_proj_weight"]["input"] == 1
    resize(layer, edit)
    assert shapes(layer) == shapes(build(16, 4, 24))
    assert noted(layer) == noted(build(16, 4, 24))


def broken(edit, *path, value):
    edit = copy.deepcopy(edit)
    place = edit
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return edit


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("path",), 3),
        (("path",), "elsewhere"),
        (("axes",), None),
        (("axes", "width"), [4]),
        (("axes", "width"), [4, -8]),
        (("axes", "width"), [4, True]),
        (("axes", "width"), [8, 4]),
        (("axes", "ffn"), [6, 10**6]),
        (("tensors",), []),
        (("tensors", "up.weight"), "x"),
        (("tensors", "up.weight", "dims"), ["ffn", "sun"]),
        (("tensors", "up.weight", "dims"), ["ffn", "²"]),
        (("tensors", "up.weight", "dims"), [["ffn"], "width"]),
        (("tensors", "up.weight", "to"), [12, 9]),
        (("tensors", "up.weight", "from"), [5, 4]),
        (("tensors", "away.weight"), {"dims": ["width"], "from": [4], "to": [8]}),
        (("tensors", "embed.weight", "tied"), ["up.weight"]),
        (("tensors", "embed.weight", "tied"), "head.weight"),
        (("attributes",), None),
        (("attributes", "away"), {"width": [4, 8]}),
        (("attributes", "up", "in_features"), [4]),
        (("attributes", "up", "in_features"), [5, 8]),
        (("attributes", "up", "in_features"), [4, 8.0]),
        (("attributes", "up", "in_features"), [4, [8]]),
        (("attributes", "up", "in_features"), [4, "os.system"]),
        (("attributes", "up", "fresh"), [4, 8]),
        (("attributes", "up", "training"), [True, False]),
        (("attributes", "up", "training"), [1, 0]),
        (("attributes", "up", "_parameters"), [4, 8]),
        (("attributes", "up", "forward"), [4, 8]),
        (("attributes", "norm", "normalized_shape"), [[4], ["x"]]),
        (("attributes", "norm", "normalized_shape"), [[4], [8, 8]]),
        (("config",), None),
        (("config", "hidden_size"), [4, 8]),
    ],
)
def test_a_damaged_edit_is_refused_before_anything_is_touched(path, value):
    net = Net()
    before = {name: (id(t), t._version, tuple(t.shape)) for name, t in plain_tensors(net).items()}
    with pytest.raises(CheckpointError):
        check_resize(net, broken(edit_of(net, {"width": 8}), *path, value=value))
    assert {name: (id(t), t._version, tuple(t.shape)) for name, t in plain_tensors(net).items()} == before


def test_an_edit_made_on_another_size_is_refused():
    with pytest.raises(CheckpointError, match=r"token of shape \[1, 4\]; this Net has \[1, 8\]"):
        check_resize(Net(8, 12), edit_of(Net(), {"width": 8}))


def test_a_tie_that_is_gone_is_noticed():
    net, edit = Net(), edit_of(Net(), {"width": 8})
    net.head.weight = nn.Parameter(torch.zeros(7, 4))
    with pytest.raises(CheckpointError, match=r"head.weight was tied to embed.weight"):
        check_resize(net, edit)


def test_configurations_follow_where_they_note_the_old_value():
    class Config:
        def __init__(self):
            self.hidden_size, self.inner = 4, None

    net = Net()
    net.config = net.up.config = Config()
    width_map = WidthMap(NET.sizes, LAYERS, NET.tensors, {"": {"width": "width"}}, {"hidden_size": "width", "inner": "ffn"})
    edit = width_edit(net, "", width_map, {"width": 8})
    assert edit["config"] == {"hidden_size": [4, 8]}  # None stands for the old proportion, which is kept
    edit = width_edit(net, "", width_map, {"width": 8, "ffn": 13})
    assert edit["config"] == {"hidden_size": [4, 8], "inner": [None, 13]}
    check_resize(net, edit)
    resize(net, edit)
    assert (net.config.hidden_size, net.config.inner) == (8, 13)
    undo_resize(net, edit)
    assert (net.config.hidden_size, net.config.inner) == (4, None)
    net.config.hidden_size = 5
    with pytest.raises(CheckpointError, match="hidden_size=4"):
        check_resize(net, edit)
