"""The arithmetic of growth in width, tensor by tensor."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from width_networks import EXACT, IMAGES, ready, vit

from lightning_peft.structure.width import resize
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.weights.maps import plain_values
from lightning_peft_plugins.growth._layer_growth import lemon, ligo, msg, net2net
from lightning_peft_plugins.growth._layer_growth.ligo_training import init_coefficients
from lightning_peft_plugins.growth._layer_growth.width_families import find_width_map

sizes = st.tuples(st.integers(2, 7), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair)))
seeds = st.integers(0, 1000)


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(sizes, sizes, seeds, st.booleans())
def test_readers_of_copies_compute_what_readers_of_originals_did(hidden, out, seed, random):
    w, x = normal(out[0], hidden[0], seed=seed), normal(3, hidden[0], seed=seed + 1)
    index = net2net.unit_mapping(*hidden, torch.Generator().manual_seed(seed) if random else None)
    rows = net2net.unit_mapping(*out)
    wide = net2net.replicate(net2net.share(w, 1, index), 0, rows)
    torch.testing.assert_close(x[:, index] @ wide.T, (x @ w.T)[:, rows], rtol=0, atol=EXACT)


@given(sizes, seeds, st.sampled_from([lemon.project_columns, lemon.complement_columns]), st.booleans(), st.sampled_from([0, 1]))
def test_free_columns_compute_what_the_old_ones_did(size, seed, solve, stream, dim):
    old, new = size
    w, x = normal(4, old, seed=seed), normal(3, old, seed=seed + 1)
    index = lemon.stream_index(old, new) if stream else torch.arange(new) % old
    wide_x = torch.where(index >= 0, x[:, index.clamp(min=0)], 0.0)
    free = normal(4, new, seed=seed + 2)
    wide = solve(w, 1, index, free) if dim == 1 else solve(w.T, 0, index, free.T).T
    torch.testing.assert_close(wide_x @ wide.T, x @ w.T, rtol=0, atol=EXACT)
    assert torch.equal(wide[:, index < 0], free[:, index < 0])
    if solve is lemon.project_columns:  # what is taken away is the same for all copies: the nearest point of the set
        taken = free - wide
        torch.testing.assert_close(taken[:, index >= 0], taken[:, :old][:, index[index >= 0]], rtol=0, atol=EXACT)


@given(sizes, seeds)
def test_norms_of_an_expanded_stream_return_copies_and_zeros(size, seed):
    old, new = size
    x, w, b, eps = normal(3, old, seed=seed), normal(old, seed=seed + 1), normal(old, seed=seed + 2), 1e-3
    s, copies, rest = lemon.variance_ratio(old, new), new // old, new % old
    weight = torch.cat((w.repeat(copies), w[:rest])) * math.sqrt(s)
    bias = lemon.expand_stream(b, 0, new, zero=True)
    wide = F.layer_norm(lemon.expand_stream(x, 1, new), (new,), weight, bias, eps * s)
    expected = lemon.expand_stream(F.layer_norm(x, (old,), w, b, eps), 1, new, zero=True)
    torch.testing.assert_close(wide, expected, rtol=0, atol=1e-11)
    wide = F.rms_norm(lemon.expand_stream(x, 1, new, zero=True), (new,), weight, eps * s)
    torch.testing.assert_close(wide, lemon.expand_stream(F.rms_norm(x, (old,), w, eps), 1, new, zero=True), rtol=0, atol=1e-11)


@given(sizes, seeds)
def test_scaled_writers_write_the_mean(size, seed):
    old, new = size
    w, gain, x = normal(old, 3, seed=seed), normal(old, seed=seed + 1), normal(2, 3, seed=seed + 2)
    wide = lemon.expand_gain(gain, new) * (x @ lemon.expand_stream(w, 0, new, gain=gain).T)
    torch.testing.assert_close(wide, lemon.expand_stream(gain * (x @ w.T), 1, new), rtol=0, atol=1e-11)


@given(sizes, seeds)
def test_masked_norms_ignore_masked_coordinates_and_are_plain_without(size, seed):
    old, new = size
    x, w, b = (normal(*shape, seed=seed + i) for i, shape in enumerate(((3, new), (new,), (new,))))
    mask = (torch.arange(new) < old).float()
    layer, rms = msg.masked_layer_norm(x, mask, w, b, 1e-5), msg.masked_rms_norm(x, mask, w, 1e-5)
    torch.testing.assert_close(layer[:, :old], F.layer_norm(x[:, :old], (old,), w[:old], b[:old], 1e-5))
    torch.testing.assert_close(rms[:, :old], F.rms_norm(x[:, :old], (old,), w[:old], 1e-5))
    assert not bool(layer[:, old:].any() or rms[:, old:].any())
    full = torch.ones(new)
    torch.testing.assert_close(msg.masked_layer_norm(x, full, w, b, 1e-5), F.layer_norm(x, (new,), w, b, 1e-5))
    torch.testing.assert_close(msg.masked_rms_norm(x, full, w, 1e-5), F.rms_norm(x, (new,), w, 1e-5))


@given(sizes, seeds)
def test_first_depth_coefficients_favour_the_source_of_a_layer(size, seed):
    old, new = size
    sources = [layer % old for layer in range(new)]
    rows = init_coefficients(sources, old, torch.Generator().manual_seed(seed))
    assert rows.argmax(1).tolist() == sources
    torch.testing.assert_close(rows.sum(1), torch.ones(new))


def test_zero_rows_keep_the_old_weights_and_add_nothing():
    net = ready(vit())
    old = plain_values(net)
    edit = width_edit(net, "", find_width_map(net), {"width": 20})
    width = {dim: torch.zeros_like(extra) for dim, extra in ligo.init_width(edit, torch.Generator()).items()}
    new = ligo.ligo_expand(old, edit, width)
    for layer in range(2):
        assert torch.equal(new[f"blocks.{layer}.mlp.fc1.weight"][:48, :12], old[f"blocks.{layer}.mlp.fc1.weight"])
        assert not bool(new[f"blocks.{layer}.mlp.fc1.weight"][:, 12:].any())
    sections = new["blocks.0.attn.qkv.weight"].unflatten(0, (3, 20))[:, :12, :12]
    assert torch.equal(sections.flatten(0, 1), old["blocks.0.attn.qkv.weight"])


def test_the_growth_operator_can_be_trained():
    net = ready(vit())
    edit = width_edit(net, "", find_width_map(net), {"width": 20})
    width = {dim: extra.requires_grad_() for dim, extra in ligo.init_width(edit, torch.Generator()).items()}
    assert set(width) == {"width", "ffn", "heads head_dim"}
    new = ligo.ligo_expand(plain_values(net), edit, width)
    resize(net, edit)
    torch.func.functional_call(net, new, (IMAGES,)).square().sum().backward()
    assert all(bool(matrix.grad.abs().sum() > 0) for matrix in width.values())
