"""Masks of MSG on modules in training."""

from __future__ import annotations

import copy
import io
import json
import pickle
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from width_networks import ANY, EXACT, IDS, IMAGES, MULTIPLE, POST, bert, gpt2, grow, llama, patch_rms_norm, ready, run, vit

from lightning_peft.structure import edits
from lightning_peft.structure.depth import blocks_edit
from lightning_peft.structure.width import resize
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.structure.width_map import Layer, Norm, WidthMap
from lightning_peft.weights.maps import plain_values, set_plain_values
from lightning_peft_plugins.growth._layer_growth.masking import Masks
from lightning_peft_plugins.growth._layer_growth.msg import msg
from lightning_peft_plugins.growth._shared.blocks_to_grow import find_blocks


@pytest.fixture(autouse=True)
def _float64_rms_norm(monkeypatch):
    patch_rms_norm(monkeypatch)


def widen(net, to=None):
    """Random new units, large enough to be seen; returns the edit as a journal would hold it."""
    return grow(net, {"width": 20} if to is None else to, partial(msg, std=0.4))


@torch.no_grad()
def deepen(net, sources=(0, 1, 0, 1)):
    """Random new blocks."""
    edit = blocks_edit(net, find_blocks(net), list(sources))
    change = edits.apply(net, edit)
    new = {name: 0.4 * torch.randn_like(value) for name, value in plain_values(net).items() if change.source(name)}
    set_plain_values(net, new)
    return json.loads(json.dumps(edit))


BUILDS = {"vit": vit, "llama": llama, "bert": bert, "gpt2": gpt2}
GROWTHS = {
    "width": widen,
    "stacked": deepen,
    "interpolated": partial(deepen, sources=(0, 0, 1, 1, 1)),
}
WIDTHS = {
    "vit": {"width": 20},
    "llama": {"width": 16, "heads": 8, "ffn": 27},
    "bert": {"width": 16, "ffn": 33},
    "gpt2": {"width": 16},
}


def grown(family, growth, **options):
    """A network, what it computed small, its edit, and what it computes grown, without masks."""
    net = ready(BUILDS[family](**options))
    with torch.no_grad():
        before = run(net)
        edit = widen(net, WIDTHS[family]) if growth == "width" else GROWTHS[growth](net)
        return net, before, edit, run(net)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def hooks(net):
    return sum(len(getattr(layer, kind)) for layer in net.modules() for kind in HOOKS)


def difference(a, b):
    return float((a - b).detach().abs().max())


@torch.no_grad()
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("family", BUILDS)
def test_growth_begins_where_it_was_and_ends_without_a_trace(family, growth):
    net, before, edit, plain = grown(family, growth)
    assert difference(plain, before) > 1e-3
    masks = Masks.install(net, edit)
    assert difference(run(net), before) <= EXACT
    found = [difference(run(net), before) for value in (0.01, 0.1) if masks.set(value) is None]
    assert 1e-9 < found[0] < found[1]
    masks.set(1.0)
    assert torch.equal(run(net), plain)
    masks.remove()
    assert hooks(net) == 0
    assert torch.equal(run(net), plain)


@torch.no_grad()
@pytest.mark.parametrize(("build", "to"), MULTIPLE + ANY + POST)
def test_masked_width_is_exact_for_any_network(build, to):
    net = ready(build())
    before = run(net)
    edit = widen(net, to)
    plain = run(net)
    masks = Masks.install(net, edit)
    assert difference(run(net), before) <= EXACT
    masks.set(1 - 1e-12)  # nearly without masks: the same function, computed with them
    assert difference(run(net), plain) <= 1e-6 * float(plain.abs().max())
    masks.set(1.0)
    assert torch.equal(run(net), plain)


@pytest.mark.parametrize("growth", ["width", "stacked"])
@pytest.mark.parametrize("family", BUILDS)
def test_masked_new_weights_get_no_gradient_and_old_ones_the_one_they_had(family, growth):
    net = ready(BUILDS[family]())
    run(net).square().sum().backward()
    before = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    net.zero_grad(set_to_none=True)
    edit = widen(net, WIDTHS[family]) if growth == "width" else deepen(net)
    masks = Masks.install(net, edit)
    run(net).square().sum().backward()
    for name, parameter in net.named_parameters():
        total, old = parameter.grad.abs().sum(), before.get(name)
        if old is not None:  # the rest of a wider tensor has a gradient of zero, up to what rounding leaves
            torch.testing.assert_close(total, old.abs().sum(), rtol=1e-9, atol=1e-9)
        else:
            assert float(total) == 0
    masks.set(0.5)
    net.zero_grad()
    run(net).square().sum().backward()
    assert all(bool(parameter.grad.any()) for name, parameter in net.named_parameters() if "key.bias" not in name)


@torch.no_grad()
@pytest.mark.parametrize("growth", ["width", "stacked"])
@pytest.mark.parametrize("family", BUILDS)
def test_copies_follow_the_mask_with_weights_of_their_own(family, growth):
    net, _, edit, _ = grown(family, growth)
    masks = Masks.install(net, edit, 0.3)
    average = copy.deepcopy(net)
    for parameter in average.parameters():
        parameter.mul_(0.9)
    masks.set(0.6)
    live = run(average)
    for parameter in net.parameters():
        parameter.mul_(0.9)
    assert torch.equal(run(net), live)
    for parameter in net.parameters():
        parameter.zero_()
    assert torch.equal(run(average), live)
    masks.remove()
    assert hooks(average) > 0
    assert difference(run(average), live) > 0
    assert torch.equal(run(average), run(without_hooks(average)))


def without_hooks(net):
    net = copy.deepcopy(net)
    for layer in net.modules():
        for kind in HOOKS:
            getattr(layer, kind).clear()
    return net


@torch.no_grad()
@pytest.mark.parametrize("growth", ["width", "stacked"])
def test_a_saved_module_keeps_its_mask(growth):
    net, _, edit, _ = grown("vit", growth)
    masks = Masks.install(net, edit, 0.3)
    masked = run(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    saved = [pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)]
    masks.remove()
    assert all(torch.equal(run(other), masked) for other in saved)


@torch.no_grad()
@pytest.mark.parametrize("growth", ["width", "stacked"])
@pytest.mark.parametrize("family", BUILDS)
def test_a_resumed_module_computes_the_same(family, growth):
    net, _, edit, _ = grown(family, growth)
    Masks.install(net, edit, 0.3)
    resumed = BUILDS[family]().double().eval()
    edits.apply(resumed, edit)
    resumed.load_state_dict(net.state_dict())
    Masks.install(resumed, edit, 0.3)
    assert torch.equal(run(resumed), run(net))


def outcome(forward, net):
    net.zero_grad(set_to_none=True)
    found = forward()
    found.square().sum().backward()
    return found.detach(), [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize(("family", "growth"), [("vit", "stacked"), ("llama", "width")])
def test_masks_in_compiled_networks_move_without_compiling_again(family, growth):
    net, data = ready(BUILDS[family]()), IMAGES if family == "vit" else IDS
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return run_as_it_is(graph, inputs)

    def output(found):
        return found if isinstance(found, torch.Tensor) else found[0]

    run_as_it_is = torch._dynamo.lookup_backend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend)
    with torch.no_grad():
        before = output(compiled(data))
        edit = widen(net, WIDTHS[family]) if growth == "width" else deepen(net)
        plain = run(net)
        masks = Masks.install(net, edit)
        assert difference(output(compiled(data)), before) <= EXACT
    graphs = []
    for value in (0.25, 0.5, 0.75):
        masks.set(value)
        found, gradients = outcome(lambda: output(compiled(data)), net)
        expected, own = outcome(lambda: run(net), net)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(gradients, own, rtol=1e-9, atol=1e-9)
        graphs.append(len(frames))
    assert graphs[0] == graphs[-1]
    masks.set(1.0)
    torch.testing.assert_close(output(compiled(data)), plain, rtol=0, atol=1e-11)
    masks.remove()
    torch.testing.assert_close(output(compiled(data)), plain, rtol=0, atol=1e-11)
    torch._dynamo.reset()


@pytest.mark.parametrize("growth", ["width", "stacked"])
@pytest.mark.parametrize("family", BUILDS)
def test_masks_work_in_mixed_precision(family, growth):
    def call(net):  # a context for each step, as Lightning has it: autocast keeps casts of weights until it is left
        with torch.autocast("cpu", torch.bfloat16):
            return net(IMAGES.float()) if family == "vit" else run(net)

    net = ready(BUILDS[family]()).float()
    before = call(net)
    edit = widen(net, WIDTHS[family]) if growth == "width" else deepen(net)
    plain = call(net)
    masks = Masks.install(net, edit)
    start = call(net)
    assert start.dtype == before.dtype
    torch.testing.assert_close(start, before, rtol=0.02, atol=0.02)
    masks.set(0.5)
    call(net).square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in net.parameters())
    masks.set(1.0)
    assert torch.equal(call(net), plain)


@pytest.mark.parametrize("growth", ["width", "stacked"])
def test_masks_work_in_half_precision(growth):
    net = ready(vit()).bfloat16()
    before = net(IMAGES.bfloat16())
    edit = widen(net, WIDTHS["vit"]) if growth == "width" else deepen(net)
    masks = Masks.install(net, edit)
    start = net(IMAGES.bfloat16())
    assert start.dtype == torch.bfloat16
    torch.testing.assert_close(start, before, rtol=0.05, atol=0.05)
    masks.set(0.5)
    net(IMAGES.bfloat16()).sum().backward()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("growth", ["width", "stacked"])
@pytest.mark.parametrize("family", BUILDS)
def test_masks_work_under_activation_checkpointing(family, growth, reentrant):
    net, _, edit, _ = grown(family, growth)
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    Masks.install(net, edit, 0.4)
    net.train()
    gradients = []
    for on in (False, True):
        if on and family == "vit":
            net.set_grad_checkpointing()
        elif on:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        net.zero_grad(set_to_none=True)
        run(net).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-10)


def test_masks_first_met_in_inference_mode_can_be_trained_with():
    net, _, edit, _ = grown("vit", "width")
    masks = Masks.install(net, edit, 0.3)
    masks._held.clear()  # as on a device the module was moved to later
    with torch.inference_mode():
        run(net)
    masks.set(0.5)
    run(net).sum().backward()


@torch.no_grad()
def test_two_growths_can_be_under_way():
    net = ready(llama())
    before = run(net)
    first = Masks.install(net, widen(net, WIDTHS["llama"]))
    second = Masks.install(net, deepen(net))  # its copies came with the masks of the first
    assert difference(run(net), before) <= EXACT
    for masks in (first, second):
        masks.set(1.0)
    plain = run(net)
    for masks in (first, second):
        masks.remove()
    assert torch.equal(run(net), plain)
    assert hooks(net) == 0


@torch.no_grad()
@pytest.mark.parametrize("sources", [(0, 1, 0, 1), (0, 0, 1, 1, 1), (1, 1)])
@pytest.mark.parametrize("family", BUILDS)
def test_masks_find_their_layers_after_later_edits(family, sources):
    net = ready(BUILDS[family]())
    wider = widen(net, WIDTHS[family])
    Masks.install(net, wider, 0.3)
    deeper = deepen(net, sources)
    Masks.install(net, deeper, 0.6)
    deepest = deepen(net, [place for place in range(len(sources)) for _ in range(2)])
    masked = run(net)
    plain = without_hooks(net)
    journal = [wider, deeper, deepest]
    for place, value in enumerate((0.3, 0.6)):
        Masks.install(plain, journal[place], value, journal[place + 1 :])
    assert hooks(plain) == hooks(net)
    assert difference(run(plain), masked) <= EXACT


def test_width_cannot_grow_again_below_masks():
    net = ready(vit())
    masks = Masks.install(net, widen(net, {"width": 16}), 0.9)
    edit = widen(net, {"width": 20})
    with pytest.raises(MisconfigurationException, match=r"blocks.0.attn.qkv has grown again.*more steps"):
        Masks.install(net, edit)
    masks.set(1.0)
    Masks.install(net, edit)


def test_a_mask_lies_between_0_and_1():
    net, _, edit, _ = grown("vit", "stacked")
    with pytest.raises(MisconfigurationException, match="between 0 and 1"):
        Masks.install(net, edit, 1.1)


class Convolutions(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(1, 4, 3), norm or nn.Identity(), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.second(input=self.norm(self.first(x)).relu())


CONVOLUTIONS = WidthMap({"hidden": 4}, {"first": Layer(output="hidden"), "second": Layer("hidden"), "norm": Norm("hidden")})


def test_convolutions_are_masked_over_channels_and_arguments_may_be_named():
    net, x = Convolutions(), torch.randn(2, 1, 6, 6)
    before = net(x)
    edit = width_edit(net, "", CONVOLUTIONS, {"hidden": 7})
    values = plain_values(net)
    values = {name: value.clone() for name, value in values.items()}
    resize(net, edit)
    set_plain_values(net, msg(values, edit, torch.Generator()))
    Masks.install(net, edit)
    torch.testing.assert_close(net(x), before)


@pytest.mark.parametrize(
    "norm", [lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(1, 4), lambda: nn.InstanceNorm2d(4, affine=True)]
)
def test_norms_that_are_none_of_the_known_are_refused(norm):
    net = Convolutions(norm())
    state = {name: value.clone() for name, value in net.state_dict().items()}
    kept = WidthMap(CONVOLUTIONS.sizes, CONVOLUTIONS.layers, {"norm.running*": ("hidden",), "norm.num*": None})
    edit = width_edit(net, "", kept, {"hidden": 7})
    resize(net, edit)
    with pytest.raises(MisconfigurationException, match=r"norm \(.*does not compute what a LayerNorm"):
        Masks.install(net, edit)
    assert hooks(net) == 0
    assert all(not name.startswith("norm.running") or not bool(value[4:].any()) for name, value in net.state_dict().items())
    assert len(state) == len(net.state_dict())


def test_norms_without_weights_count_units_too():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)).double()
    width_map = WidthMap({"hidden": 4}, {"0": Layer(output="hidden"), "1": Norm("hidden"), "2": Layer("hidden")})
    x = torch.randn(5, 3, dtype=torch.float64)
    before, values = net(x), {name: value.clone() for name, value in plain_values(net).items()}
    edit = width_edit(net, "", width_map, {"hidden": 7})
    resize(net, edit)
    set_plain_values(net, msg(values, edit, torch.Generator()))
    Masks.install(net, edit)
    assert difference(net(x), before) <= EXACT


def test_weights_that_no_layer_call_applies_are_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
    width_map = WidthMap(
        {"width": 8, "heads": 2, "head_dim": 4, "ffn": 12},
        {
            "self_attn.out_proj": Layer("heads head_dim", "width"),
            "linear1": Layer("width", "ffn"),
            "linear2": Layer("ffn", "width"),
            "norm?": Norm(),
        },
        {"self_attn.in_proj_*": Layer("width", "3 heads head_dim")},
        {"self_attn": {"embed_dim": "width", "kdim": "width", "vdim": "width", "num_heads": "heads"}},
    )
    edit = width_edit(layer, "", width_map, {"width": 16})
    resize(layer, edit)
    with pytest.raises(MisconfigurationException, match=r"self_attn.in_proj_weight reads new units without a layer"):
        Masks.install(layer, edit)


def test_blocks_that_cannot_grow_from_the_identity_are_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    outer = nn.Sequential(net)
    edit = {**blocks_edit(outer, "0", [0, 1, 1]), "shared": True}
    edits.apply(outer, edit)
    with pytest.raises(MisconfigurationException, match="cannot be masked apart"):
        Masks.install(outer, edit)

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x)[:1]

    outer = nn.Sequential(nn.Sequential(Pool()))
    edit = blocks_edit(outer, "0", [0, 0])
    edits.apply(outer, edit)
    Masks.install(outer, edit)
    with pytest.raises(MisconfigurationException, match=r"A new Pool returns \(1, 2\) for \(3, 2\)"):
        outer[0][1](torch.zeros(3, 2))
