"""The compiled kernels against PyTorch, and what happens where they cannot be built or used."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.measure.flop_count import FlopCount
from lightning_peft_plugins.pruning._ftwt.skipping import native
from lightning_peft_plugins.pruning._ftwt.skipping.native import Geometry, Kernels, Part, by_input
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import ChannelPredictor, channel_means, chosen
from lightning_peft_plugins.pruning._ftwt.skipping.selection import Selection, spread
from lightning_peft_plugins.pruning._ftwt.skipping.unit_predictor import UnitPredictor

CL = torch.channels_last
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler is on the path")


def compiled() -> Kernels:
    found = native.kernels()
    assert found is not None, native.missing()
    return found


def some(channels: int, share: float) -> Tensor:
    """Some positions, ascending, at least one."""
    return torch.randperm(channels)[: max(1, round(share * channels))].sort().values


def taken(positions: Tensor | None, channels: int, padding: int = 0) -> Part:
    if positions is None:
        return Part(channels, channels)
    return Part(len(positions), len(positions) + padding, F.pad(positions, (0, padding)))


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    channels=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    filters=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    shares=st.tuples(st.sampled_from([None, 0.1, 0.5, 0.9]), st.sampled_from([None, 0.1, 0.5, 0.9])),
    extra=st.integers(0, 3),
    threads=st.integers(1, 3),
    bias=st.booleans(),
)
def test_convolves_as_pytorch_does(
    seed: int,
    batch: int,
    size: tuple[int, int],
    channels: tuple[int, int],
    filters: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    shares: tuple[float | None, float | None],
    extra: int,
    threads: int,
    bias: bool,
) -> None:
    geometry = Geometry(filters, stride, padding, dilation)
    if min(geometry.places(*size)) < 1:
        return
    torch.manual_seed(seed)
    weight, offset = torch.randn(channels[1], channels[0], *filters), torch.randn(channels[1]) if bias else None
    columns, rows = (None if share is None else some(n, share) for share, n in zip(shares, channels, strict=True))
    whole = torch.randn(batch, channels[0], *size)
    if columns is not None:
        whole = torch.zeros_like(whole).index_copy_(1, columns, whole[:, columns])
    expected = F.conv2d(whole, weight, offset, stride, padding, dilation)
    given_ = whole if columns is None else F.pad(whole[:, columns], (0, 0, 0, 0, 0, extra))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = compiled().convolve(
            given_.contiguous(memory_format=CL),
            by_input(weight),
            offset,
            geometry,
            taken(columns, channels[0], extra),
            taken(rows, channels[1], extra),
        )
    finally:
        torch.set_num_threads(before)
    if rows is not None:
        assert not found[:, len(rows) :].any()
        found, expected = found[:, : len(rows)], expected[:, rows]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("size", [40, 90])
def test_large_maps_are_computed_in_parts(size: int) -> None:
    # 40: the packed weight stays in the cache for parts of the map; 90 inputs more: it is too large for that.
    torch.manual_seed(0)
    inputs, outputs = (64, 70) if size == 40 else (300, 130)
    weight, maps = torch.randn(outputs, inputs, 3, 3) / 30, torch.randn(1, inputs, 40, 41).contiguous(memory_format=CL)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    found = compiled().convolve(maps, by_input(weight), None, geometry, Part(inputs, inputs), Part(outputs, outputs))
    torch.testing.assert_close(found, F.conv2d(maps, weight, padding=1), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("options", [(), ("-mavx2", "-mfma")])
def test_processors_with_narrower_vectors_compute_the_same(options: tuple[str, ...], tmp_path: Path) -> None:
    import ctypes

    capability = torch.backends.cpu.get_cpu_capability()
    if options and capability not in ("AVX2", "AVX512"):
        pytest.skip(f"this processor has {capability}")
    library = tmp_path / "kernels.so"
    source = Path(native.__file__).with_name("kernels.c")
    assert COMPILER is not None
    command = [
        COMPILER,
        str(source),
        "-o",
        str(library),
        "-O1",
        "-fPIC",
        "-shared",
        *options,
        "-lm",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    subprocess.run([*command, "-Wno-unknown-pragmas", "-Wno-unused-parameter"], check=True)
    torch.manual_seed(0)
    weight, columns, rows = torch.randn(77, 90, 3, 3), some(90, 0.4), some(77, 0.6)
    maps = torch.randn(2, len(columns), 9, 8).contiguous(memory_format=CL)
    found = Kernels(ctypes.CDLL(str(library))).convolve(
        maps,
        by_input(weight),
        None,
        Geometry((3, 3), (2, 1), (1, 0), (1, 1)),
        taken(columns, 90),
        taken(rows, 77),
    )
    expected = F.conv2d(maps, weight[rows][:, columns], stride=(2, 1), padding=(1, 0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    channels=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.integers(1, 20),
    share=st.sampled_from([None, 0.05, 0.5]),
    normalise=st.sampled_from(["softmax", "standard"]),
    shift=st.sampled_from([-2.0, 0.0]),
)
def test_chooses_as_the_predictor_does(
    seed: int, channels: tuple[int, int], size: int, share: float | None, normalise: Any, shift: float
) -> None:
    torch.manual_seed(seed)
    predictor = ChannelPredictor(*channels, normalise)
    nn.init.normal_(predictor.weight)
    nn.init.normal_(predictor.bias, shift)
    reads = None if share is None else Selection(channels[0], 1)
    maps = torch.randn(1, channels[0], size, size) * 3 + 1
    if reads is not None:
        reads.accept(some(channels[0], share), torch.ones(1, channels[0]))
        if reads.now.index is not None:
            maps = maps[:, reads.now.index]
    maps = maps.contiguous(memory_format=CL)
    unit, writes = UnitPredictor(predictor, convolution=True, tokens=False), Selection(channels[1], 1)
    with torch.no_grad():
        unit.choose(maps, reads, writes, dense=False)
        whole = maps if reads is None or reads.now.index is None else spread(maps, reads.now, 1)
        logits = predictor(channel_means(whole, convolution=True, tokens=False))
    mask = chosen(logits)[0]
    found = torch.ones(channels[1], dtype=torch.bool)
    if writes.now.index is not None:
        found = torch.zeros_like(found).index_fill_(0, writes.now.index, True)
    clear = (logits[0].abs() > 1e-3) if (logits > 0).any() else torch.ones_like(mask)
    assert torch.equal(found[clear], mask[clear])
    torch.testing.assert_close(unit(maps, reads), logits, rtol=1e-3, atol=1e-3)  # and so does PyTorch


@needs_compiler
def test_says_where_it_must_not_be_used() -> None:
    plain, weight = torch.ones(1, 2, 3, 3), torch.ones(2)
    assert native.usable(plain, weight)
    assert not native.usable(plain.double(), weight)
    assert not native.usable(nn.Parameter(plain), weight)
    with torch.no_grad():
        assert native.usable(plain.requires_grad_(), weight)
    plain.requires_grad_(False)
    assert not native.usable(plain, nn.Parameter(weight))
    assert not native.usable(plain, weight, nn.Parameter(weight))
    assert not native.usable(plain.to("meta"), weight)
    assert not native.usable(plain[:0], weight)
    assert not native.usable(torch._neg_view(plain), weight)
    assert not native.usable(plain, torch._efficientzerotensor(2))
    assert not native.usable(plain, weight.as_subclass(type("Quantised", (Tensor,), {})))
    with FlopCount():  # operations are counted as PyTorch's
        assert not native.usable(plain, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not native.usable(plain, weight)
