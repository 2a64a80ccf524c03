from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft.structure.axes import index_map, is_old, resized, size

sizes = st.integers(1, 4).flatmap(lambda old: st.tuples(st.just(old), st.integers(old, 9)))


@given(sizes, sizes, st.integers(1, 3))
def test_coordinates_of_a_product_are_those_of_its_axes(a, b, sections):
    axes, dim = {"a": a, "b": b}, f"{sections} a b 2"
    index, old = index_map(dim, axes), is_old(dim, axes)
    assert len(index) == len(old) == size(dim, axes) == sections * a[1] * b[1] * 2
    assert index[old].tolist() == list(range(sections * a[0] * b[0] * 2))  # old coordinates are there, once, in order
    expected = torch.arange(size(dim, axes, 0)).view(sections, a[0], b[0], 2)[:, torch.arange(a[1]) % a[0]][
        :, :, torch.arange(b[1]) % b[0]
    ]
    assert torch.equal(index, expected.flatten())


@given(sizes, sizes)
def test_copies_equal_their_source_and_padding_is_zero(a, b):
    axes, dims = {"a": a, "b": b}, ["2 a", "b"]
    value = torch.rand(2 * a[0], b[0]) + 1
    copied, padded = resized(value, dims, axes, "copy"), resized(value, dims, axes, "pad")
    assert torch.equal(copied, value[index_map("2 a", axes)][:, index_map("b", axes)])
    kept = is_old("2 a", axes)[:, None] & is_old("b", axes)
    assert torch.equal(padded[kept].view_as(value), value)
    assert not bool(padded[~kept].any())
