"""Growth in width, end to end on real architectures in float64."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from width_networks import (
    ANY,
    EXACT,
    MULTIPLE,
    POST,
    bert,
    gemma,
    gpt2,
    grow,
    llama,
    packed_swiglu,
    patch_rms_norm,
    ready,
    run,
    vit,
)

from lightning_peft.structure.axes import is_old
from lightning_peft.structure.width import check_resize, resize, undo_resize
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.weights.maps import plain_values, set_plain_values
from lightning_peft_plugins.growth._layer_growth import lemon, ligo, msg, net2net
from lightning_peft_plugins.growth._layer_growth.width_families import find_width_map


@pytest.fixture(autouse=True)
def _float64_rms_norm(monkeypatch):
    patch_rms_norm(monkeypatch)


def error(build, to, operator, prepare=lambda edit: edit):
    net = ready(build())
    with torch.no_grad():
        before = run(net)
        assert before.std() > 0.01
        grow(net, to, operator, prepare)
        return float((run(net) - before).abs().max())


@pytest.mark.parametrize(("build", "to"), MULTIPLE)
@pytest.mark.parametrize("lossless", ["net2net", "lemon", "lemon-comp"])
def test_widths_that_multiply_are_exact(build, to, lossless):
    if lossless == "net2net":
        found = error(build, to, net2net.net2net)
    else:
        columns = "comp" if lossless == "lemon-comp" else "projection"
        found = error(build, to, partial(lemon.lemon, columns=columns), lemon.with_eps)
    assert found <= EXACT


@pytest.mark.parametrize(("build", "to"), ANY)
def test_lemon_is_exact_at_any_width_before_norms(build, to):
    assert error(build, to, lemon.lemon, lemon.with_eps) <= EXACT


@pytest.mark.parametrize(("build", "to"), ANY + POST)
def test_uneven_replication_is_approximate(build, to):
    assert 1e-4 < error(build, to, net2net.net2net) < 1


@pytest.mark.parametrize(("build", "to"), POST)
def test_lemon_is_approximate_on_uneven_post_norm_networks(build, to):
    assert 1e-4 < error(build, to, lemon.lemon, lemon.with_eps) < 1


@pytest.mark.parametrize(("build", "to"), MULTIPLE + ANY + POST)
def test_masked_growth_is_exact_for_any_network_and_width(build, to):
    net = ready(build())
    with torch.no_grad():
        before = run(net)
        edit = grow(net, to, msg.msg)
        plain = run(net)
        for path, mask in masks(edit, 0.0).items():
            apply_mask(net.get_submodule(path), mask, edit["norms"].get(path))
        assert float((run(net) - before).abs().max()) <= EXACT
    assert float((plain - before).abs().max()) > 1e-4  # the masks do it, not the weights


def test_masks_of_one_can_be_dropped():
    net = ready(vit())
    with torch.no_grad():
        edit = grow(net, {"width": 20}, msg.msg)
        plain = run(net)
        assert {tuple(mask.unique().tolist()) for mask in masks(edit, 0.5).values()} == {(0.5, 1.0)}
        for path, mask in masks(edit, 1.0).items():
            apply_mask(net.get_submodule(path), mask, edit["norms"].get(path))
        assert float((run(net) - plain).abs().max()) <= EXACT


def masks(edit, mask):
    """Masks of the inputs of each layer and norm that has new ones, by its name: 1 for old coordinates, ``mask`` for new."""
    dims = edit["inputs"] | {path: norm["dim"] for path, norm in edit["norms"].items()}
    old = {path: is_old(dim, edit["axes"]) for path, dim in dims.items()}
    return {path: torch.where(flags, 1.0, mask) for path, flags in old.items() if not bool(flags.all())}


def apply_mask(layer, mask, norm):
    if norm is None:
        layer.register_forward_pre_hook(lambda _, args: (args[0] * mask.to(args[0]), *args[1:]))
    elif norm["kind"] == "rms":
        weight = layer.weight + norm.get("offset", 0.0)
        layer.forward = lambda x: msg.masked_rms_norm(x, mask, weight, norm["eps"][1])
    else:
        layer.forward = lambda x: msg.masked_layer_norm(x, mask, layer.weight, layer.bias, norm["eps"][1])


@pytest.mark.parametrize("operator", [net2net.aki, ligo.ligo, partial(net2net.net2net, mapping="random", noise=0.05)])
@pytest.mark.parametrize("build", [vit, llama, gemma, bert, gpt2])
def test_operators_that_preserve_nothing_still_give_a_working_network(build, operator):
    found = error(build, {"width": 24}, operator)
    assert 0 < found < math.inf


STRUCTURE = [
    (vit, {"width": 24, "ffn": 50}, {"width": 24, "heads": 6, "ffn": 50}),
    (partial(vit, init_values=0.1, qk_norm=True), {"width": 16}, {"width": 16, "heads": 4}),
    (packed_swiglu, {"width": 24}, {"width": 24, "heads": 6, "ffn": 20}),
    (llama, {"width": 24}, {"width": 24, "heads": 12, "kv_heads": 6, "ffn": 40}),
    (llama, {"width": 36, "heads": 9}, {"width": 36, "heads": 9, "kv_heads": 3, "ffn": 60}),
    (partial(gemma, kind="Gemma"), {"width": 24}, {"width": 24, "heads": 12, "kv_heads": 6, "ffn": 40}),
    (partial(gemma, kind="Gemma2"), {"width": 27, "heads": 9}, {"width": 27, "heads": 9, "kv_heads": 3, "ffn": 45}),
    (gemma, {"width": 36, "heads": 9}, {"width": 36, "heads": 9, "kv_heads": 3, "ffn": 60}),
    (bert, {"width": 24, "ffn": 33}, {"width": 24, "heads": 6, "ffn": 33}),
    (gpt2, {"width": 24}, {"width": 24, "heads": 6}),
    (gpt2, {"width": 24, "ffn": 77}, {"width": 24, "heads": 6, "ffn": 77}),
    (partial(gpt2, ffn=30), {"width": 16}, {"width": 16, "heads": 4, "ffn": 40}),
]


@pytest.mark.parametrize(("build", "to", "sizes"), STRUCTURE)
def test_a_grown_network_is_the_one_its_class_builds(build, to, sizes):
    net, fresh = build(), build(**sizes)
    edit = width_edit(net, "", find_width_map(net), to)
    before, untouched = structure(net), copy.deepcopy(net.state_dict())
    resize(net, edit)
    assert structure(net) == structure(fresh)
    net.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(run(net.double().eval()), run(fresh.double().eval()), rtol=0, atol=0)
    net.float()
    undo_resize(net, edit)
    assert structure(net) == before
    assert {name: value.shape for name, value in net.state_dict().items()} == {k: v.shape for k, v in untouched.items()}


def structure(net):
    """Everything but values: names, shapes, ties, numbers that modules note, configuration, timm's feature list."""
    kinds = (int, float, bool, str, tuple)
    groups = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return (
        {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()},
        sorted(groups.values()),
        {
            path: {k: v for k, v in (vars(layer) | layer._buffers).items() if _is_noted(v, kinds) and k != "training"}
            for path, layer in net.named_modules()
        },
        net.config.to_dict() if hasattr(net, "config") else None,
        getattr(net, "feature_info", None),
    )


def _is_noted(value, kinds):
    return type(value) in kinds or (isinstance(value, torch.Tensor) and not value.ndim)


def test_lemon_changes_epsilon_where_the_configuration_will_find_it():
    net = ready(llama())
    edit = grow(net, {"width": 15, "heads": 15, "ffn": 25}, lemon.lemon, lemon.with_eps)
    assert net.config.rms_norm_eps == net.model.norm.variance_epsilon == pytest.approx(0.8e-6)
    undo_resize(net, edit)
    assert net.config.rms_norm_eps == net.model.norm.variance_epsilon == 1e-6


def test_a_grown_network_survives_a_save(tmp_path):
    net = ready(gpt2())
    with torch.no_grad():
        before = run(net)
        grow(net, {"width": 20, "ffn": 51}, lemon.lemon, lemon.with_eps)
        net.save_pretrained(tmp_path)
        again = type(net).from_pretrained(tmp_path, dtype=torch.float64).eval()
        assert float((run(again) - before).abs().max()) <= EXACT


def test_ties_stay_ties():
    for net, names in ((llama(), ("model.embed_tokens", "lm_head")), (gpt2(), ("transformer.wte", "lm_head"))):
        grow(ready(net), {"width": 24}, lemon.lemon, lemon.with_eps)
        embedding, head = (net.get_submodule(name).weight for name in names)
        assert embedding is head
        assert embedding.shape == (11, 24)


def gradients(operator, prepare=lambda edit: edit):
    net = ready(vit())
    grow(net, {"width": 24}, operator, prepare)
    run(net).square().sum().backward()
    hidden, qkv = net.blocks[0].mlp.fc1.weight.grad, net.blocks[0].attn.qkv.weight.grad.unflatten(0, (3, 6, 4))
    return (hidden[0] - hidden[48]).abs().max() / hidden.abs().max(), (qkv[:, 0] - qkv[:, 3]).abs().max() / qkv.abs().max()


@pytest.mark.parametrize("columns", ["projection", "comp"])
def test_lemon_breaks_the_symmetry_of_copies(columns):
    assert min(gradients(partial(lemon.lemon, columns=columns), lemon.with_eps)) > 0.01


def test_copies_of_net2net_get_equal_gradients_without_noise():
    assert max(gradients(net2net.net2net)) < 1e-12
    assert min(gradients(partial(net2net.net2net, noise=0.05))) > 1e-4


def test_noise_is_on_new_coordinates_only_and_small():
    net = ready(vit())
    old = plain_values(net)
    edit = width_edit(net, "", find_width_map(net), {"width": 24})
    clean = net2net.net2net(old, edit, torch.Generator())
    noisy = net2net.net2net(old, edit, torch.Generator(), noise=0.05)
    difference = noisy["blocks.0.mlp.fc1.weight"] - clean["blocks.0.mlp.fc1.weight"]
    assert not bool(difference[:48, :12].any())
    assert float(difference[48:].std()) == pytest.approx(0.05 * float(old["blocks.0.mlp.fc1.weight"].std()), rel=0.1)
    assert torch.equal(noisy["blocks.0.norm1.weight"], clean["blocks.0.norm1.weight"])


def test_aki_takes_new_rows_from_the_next_layer():
    net = ready(vit())
    old = plain_values(net)
    edit = width_edit(net, "", find_width_map(net), {"width": 24})
    fpi, aki = net2net.net2net(old, edit, torch.Generator()), net2net.aki(old, edit, torch.Generator())
    for name in ("mlp.fc1.weight", "mlp.fc1.bias"):
        assert torch.equal(aki[f"blocks.0.{name}"][:48], fpi[f"blocks.0.{name}"][:48])
        assert torch.equal(aki[f"blocks.0.{name}"][48:], fpi[f"blocks.1.{name}"][48:])
        assert torch.equal(aki[f"blocks.1.{name}"], fpi[f"blocks.1.{name}"])
    assert torch.equal(aki["head.weight"], fpi["head.weight"])
    assert torch.equal(aki["blocks.0.norm1.weight"], fpi["blocks.0.norm1.weight"])


@pytest.mark.parametrize("operator", [net2net.net2net, net2net.aki, lemon.lemon, msg.msg, ligo.ligo])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("build", [vit, partial(gemma, ffn=24)])
def test_operators_keep_dtype_and_old_values_and_repeat_themselves(operator, dtype, build):
    net = ready(build()).to(dtype)
    old = {name: value.clone() for name, value in plain_values(net).items()}
    edit = width_edit(net, "", find_width_map(net), {"width": 16})
    first, second = (operator(old, edit, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(value.dtype == dtype for value in first.values())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(value, old[name]) for name, value in plain_values(net).items())


def test_edits_and_values_are_named_from_the_module_down():
    outer = nn.Module()
    outer.student = nn.Module()
    outer.student.net = ready(gpt2())
    with torch.no_grad():
        before = run(outer.student.net)
        edit = lemon.with_eps(width_edit(outer.student.net, "student.net", find_width_map(outer.student.net), {"width": 20}))
        values = {name: value.clone() for name, value in plain_values(outer).items()}
        check_resize(outer, edit)
        resize(outer, edit)
        set_plain_values(outer, lemon.lemon(values, edit, torch.Generator()))
        assert float((run(outer.student.net) - before).abs().max()) <= EXACT
    tied = edit["tensors"]["student.net.transformer.wte.weight"]["tied"]
    assert tied == ["student.net.lm_head.weight"]
    assert "student.net.transformer.h.0.attn.c_attn" in edit["inputs"]
    assert "student.net.transformer.ln_f" in edit["norms"]


def test_unknown_networks_are_told_how_to_give_a_map():
    with pytest.raises(MisconfigurationException, match=r"how to widen a Linear.*VisionTransformer.*width_map=WidthMap"):
        find_width_map(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "options", [{"scale_attn_norm": True}, {"global_pool": "map"}, {"class_token": True, "block_fn": "ParallelScalingBlock"}]
)
def test_variants_that_are_not_known_are_refused(options):
    models = pytest.importorskip("timm.models")
    if "block_fn" in options:
        options = {**options, "block_fn": models.vision_transformer.ParallelScalingBlock}
    net = vit(**options)
    with pytest.raises(MisconfigurationException, match=r"does not know|unknown structure"):
        width_edit(net, "", find_width_map(net), {"width": 24})


@pytest.mark.parametrize(
    ("build", "to", "says"),
    [
        (vit, {"width": 18}, "Give width=16 or width=20"),
        (bert, {"heads": 4}, "Give width=16, or leave out heads"),
        (gpt2, {"width": 8}, "at least 12"),
        (llama, {"heads": 7}, "multiple of 2 .* or of 3"),
        (llama, {"width": 18, "heads": 10}, "Give width=20, or a number of heads"),
        (gemma, {"width": 18, "heads": 10}, "Give width=20, or a number of heads"),
        (vit, {"head_dim": 8}, "cannot grow"),
    ],
)
def test_targets_that_an_architecture_cannot_have_are_refused(build, to, says):
    net = build()
    with pytest.raises(MisconfigurationException, match=says):
        width_edit(net, "", find_width_map(net), to)
