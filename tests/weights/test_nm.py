"""N:M masks against a stable sort, sparse weights against the published vectors, frames against the official schedules."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.weights import nm, nm_kernels
from lightning_peft.weights.nm import (
    compile_masks,
    decay_exponential,
    decay_linear,
    geometric_frames,
    is_nm,
    nm_mask,
    nm_violations,
    parse_pattern,
    ste_prune,
    stepwise_frames,
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# One per kernel and its borders: knock-out (both kinds, words of 2, 4, 8 bytes and beyond), pairs, counting, threshold.
PATTERNS = [(1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (4, 8), (7, 8), (1, 16), (1, 32), (31, 32)]
PATTERNS += [(3, 7), (1, 3), (2, 3), (5, 12), (2, 16), (4, 13), (8, 128), (1, 64), (5, 100), (1, 24), (1, 6)]


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skip where torch.compile cannot build a CPU kernel."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.compile(lambda x: x.abs() + 1)(torch.ones(5)).sum() == 10
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {type(error).__name__}")


def reference(weight: torch.Tensor, n: int, m: int, dim: int = -1) -> torch.Tensor:
    """Group by group with NumPy's stable argsort."""
    moved = np.moveaxis(weight.detach().double().abs().numpy(), dim, -1)
    mask = np.ones(moved.shape, dtype=bool)
    for row in np.ndindex(*moved.shape[:-1]):
        for first in range(0, moved.shape[-1] // m * m, m):
            pruned = np.argsort(moved[row][first : first + m], kind="stable")[: m - n]
            mask[(*row, first + pruned)] = False
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(mask, -1, dim)))


def tied(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Few distinct values, both signs and zeros: most groups have ties."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("kernel", [nm_kernels.eager_kernel, nm_kernels.traced_kernel])
def test_kernels_equal_stable_sort(n: int, m: int, kernel) -> None:
    for weight in (torch.randn(37, m, generator=torch.Generator().manual_seed(m)), tied((37, m), n)):
        assert torch.equal(kernel(nm_kernels.magnitude_keys(weight), n), reference(weight, n, m))


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 19), min_size=1, max_size=4),
    m=st.integers(2, 20),
    dtype=st.sampled_from(FLOATS),
    ties=st.booleans(),
)
def test_any_shape_dim_pattern_and_dtype(data, shape: list[int], m: int, dtype: torch.dtype, ties: bool) -> None:
    n, dim, seed = (data.draw(s) for s in (st.integers(1, m), st.integers(-len(shape), len(shape) - 1), st.integers(0, 99)))
    weight = tied(tuple(shape), seed, dtype)
    if not ties:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if data.draw(st.booleans()):
        weight = weight.transpose(0, -1).contiguous().transpose(0, -1)
    mask = nm_mask(weight, n, m, dim)
    assert mask.dtype is torch.bool
    assert torch.equal(mask, reference(weight, n, m, dim))
    assert is_nm(weight * mask, n, m, dim)
    assert nm_mask(weight, m, m, dim).all()


def test_ties_prune_the_first() -> None:
    assert nm_mask(torch.ones(4), 2, 4).tolist() == [False, False, True, True]
    assert nm_mask(torch.tensor([-1.0, 1.0, 2.0, -1.0]), 2, 4).tolist() == [False, False, True, True]
    assert nm_mask(torch.tensor([0.0, -0.0]), 1, 2).tolist() == [False, True]


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 5), (3, 16)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_the_largest_and_infinity_next(n: int, m: int, dtype: torch.dtype) -> None:
    weight = torch.arange(1, m + 1).to(dtype)
    weight[0] = float("nan")
    if n > 1:
        weight[1] = float("-inf")
    assert nm_mask(weight, n, m)[:n].tolist() == [True] * min(n, 2) + [False] * max(n - 2, 0)


def test_remainder_stays_dense_and_too_small_is_all_dense() -> None:
    mask = nm_mask(torch.randn(3, 10), 1, 4)
    assert mask[:, 8:].all()
    assert mask[:, :8].sum() == 3 * 2
    assert nm_mask(torch.randn(5, 3), 2, 4).all()
    assert nm_mask(torch.randn(0, 8), 2, 4).shape == (0, 8)


def test_layout_of_the_weight_is_kept() -> None:
    for weight in (torch.randn(8, 8, 3, 3), torch.randn(8, 8, 3, 3).to(memory_format=torch.channels_last)):
        mask = nm_mask(weight, 2, 4, dim=1)
        assert mask.stride() == weight.stride()
    transposed = torch.randn(4, 6).t()
    assert nm_mask(transposed, 2, 4, dim=1).stride() == transposed.stride()
    # One group per column: the groups are a view with the columns interleaved.
    assert torch.equal(nm_mask(w := torch.randn(4, 6), 2, 4, dim=0), reference(w, 2, 4, 0))


def test_parameters_meta_and_inference() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 8))
    assert not nm_mask(parameter, 2, 4).requires_grad
    meta = nm_mask(torch.empty(4, 8, device="meta"), 2, 4)
    assert meta.is_meta
    assert meta.shape == (4, 8)
    with torch.inference_mode():
        assert nm_mask(torch.randn(4, 8), 2, 4).sum() == 16


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda: nm_mask(torch.randn(8), 0, 4), "n >= 1"),
        (lambda: nm_mask(torch.randn(8), 1, 1), "at least 2"),
        (lambda: nm_mask(torch.randn(8), 4, 2), "Did you mean '2:4'"),
        (lambda: nm_mask(torch.arange(8), 2, 4), "weight.float"),
        (lambda: nm_mask(torch.randn(8), 2, 4, dim=1), "input_dim"),
        (lambda: nm_mask(torch.tensor(1.0), 2, 4), "input_dim"),
        (lambda: parse_pattern("2/4"), "'2:4'"),
        (lambda: parse_pattern("-1:4"), "'2:4'"),
        (lambda: parse_pattern((2, 4, 8)), "pair of integers"),
        (lambda: stepwise_frames(1, 4, 5, 5), "end > start"),
        (lambda: ste_prune(torch.ones(4), torch.ones(4)), "nm_mask"),
        (lambda: ste_prune(torch.ones(4), torch.ones(2, dtype=torch.bool)), "nm_mask"),
        (lambda: ste_prune(torch.ones(4), torch.ones(4, dtype=torch.bool), 1.5), r"\[0, 1\]"),
    ],
)
def test_bad_input_names_the_fix(call, fix: str) -> None:
    with pytest.raises(MisconfigurationException, match=fix):
        call()


def test_parse_pattern() -> None:
    assert parse_pattern(" 3 : 7 ") == (3, 7)
    assert parse_pattern((2, 4)) == (2, 4)


def test_violations_count_complete_groups_only() -> None:
    weight = torch.tensor([[1.0, 1, 1, 0, 1, 0, 0, 0, 9, 9, 9]])
    assert nm_violations(weight, 2, 4, 1) == 1
    assert not is_nm(weight, 2, 4, 1)
    assert is_nm(weight, 3, 4, 1)


@pytest.mark.slow
def test_compiled_kernels_serve_all_shapes_and_do_not_share_a_recompile_limit(compiler) -> None:
    torch._dynamo.reset()
    nm._compiled_kernel.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=2):  # reached by the third kernel, were the limit shared
        for n, m in [(2, 4), (2, 32)]:
            weight = tied((5, 2 * m + 1), m)
            assert torch.equal(nm_mask(weight, n, m, compiled=True), reference(weight, n, m))
        half = tied((6, 9), 0, torch.bfloat16)
        assert torch.equal(nm_mask(half, 2, 4, compiled=True), reference(half, 2, 4))
    assert not nm._Policy.broken

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for rows in range(10, 40):
        nm_mask(torch.randn(rows, 64), 2, 4, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


def test_no_compiler_warns_once_and_still_gives_the_mask(monkeypatch) -> None:
    def broken(n: int, m: int):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(nm, "_compiled_kernel", broken)
    monkeypatch.setattr(nm._Policy, "broken", set())
    weight = torch.randn(4, 8)
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler found.*compiled=False"):
        assert torch.equal(nm_mask(weight, 2, 4, compiled=True), reference(weight, 2, 4))
    nm_mask(weight, 2, 4, compiled=True)  # a second warning would be an error here


def test_auto_compiles_only_when_enabled(monkeypatch) -> None:
    used: list[tuple[int, int]] = []

    def spy(n: int, m: int):
        used.append((n, m))
        return lambda groups: nm_kernels.traced_kernel(nm_kernels.magnitude_keys(groups), n)

    monkeypatch.setattr(nm, "_compiled_kernel", spy)
    monkeypatch.setattr(nm._Policy, "compiled", False)
    nm_mask(torch.randn(8), 2, 4)
    assert used == []
    compile_masks()
    nm_mask(torch.randn(8), 2, 4)
    nm_mask(torch.randn(8), 2, 4, compiled=False)
    assert used == [(2, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 32)])
def test_traces_in_a_users_fullgraph_compile(compiler, n: int, m: int) -> None:
    def step(weight: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return ste_prune(weight, nm_mask(weight, n, m, dim=1), decay, sr_lambda=0.5, masked_grad=True).square().sum()

    compiled_step = torch.compile(step, fullgraph=True)
    for decay in (0.0, 0.25, 1.0):
        ours, theirs = (torch.nn.Parameter(tied((6, m + 2), m)) for _ in range(2))
        torch.testing.assert_close(compiled_step(ours, torch.tensor(decay)), step(theirs, torch.tensor(decay)))
        compiled_step(ours, torch.tensor(decay)).backward()
        step(theirs, torch.tensor(decay)).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


VECTOR = [0.1, -0.4, 0.3, 0.2]


@pytest.mark.parametrize(
    ("decay", "sr_lambda", "output", "grad"),
    [
        (0.0, 2e-4, [0, -0.4, 0.3, 0], [1.00002, 1, 1, 1.00004]),
        (0.0, 0.0, [0, -0.4, 0.3, 0], [1, 1, 1, 1]),
        (decay_linear(1, 2e-4), 0.0, [0.09998, -0.4, 0.3, 0.19996], [1, 1, 1, 1]),
        (decay_linear(2500, 2e-4), 0.0, [0.05, -0.4, 0.3, 0.1], [1, 1, 1, 1]),
        (decay_linear(5000, 2e-4), 0.0, [0, -0.4, 0.3, 0], [1, 1, 1, 1]),
        (decay_exponential(5000, 1e-4), 0.0, [0.060653, -0.4, 0.3, 0.121306], [1, 1, 1, 1]),
        (decay_exponential(20001, 1e-4), 0.0, [0.0135322, -0.4, 0.3, 0.0270644], [1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_published_vectors(decay: float, sr_lambda: float, output: list, grad: list, as_tensor: bool) -> None:
    weight = torch.tensor(VECTOR, requires_grad=True)
    mask = nm_mask(weight, 2, 4)
    sparse = ste_prune(weight, mask, torch.tensor(decay) if as_tensor else decay, sr_lambda=sr_lambda)
    sparse.sum().backward()
    torch.testing.assert_close(sparse, torch.tensor(output, dtype=torch.float32), rtol=0, atol=5e-7)
    torch.testing.assert_close(weight.grad, torch.tensor(grad, dtype=torch.float32), rtol=0, atol=1e-7)
    assert torch.equal(sparse[mask], weight[mask])


def test_sr_ste_alone_shrinks_pruned_weights_by_lambda_a_step() -> None:
    weight = torch.tensor(VECTOR, dtype=torch.float64, requires_grad=True)
    mask = nm_mask(weight, 2, 4)
    (0.0 * ste_prune(weight, mask, sr_lambda=2e-4)).sum().backward()
    moved = weight.detach() - weight.grad
    torch.testing.assert_close(moved, torch.where(mask, weight, weight * (1 - 2e-4)).detach(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sr_lambda", [0.0, 0.1])
@pytest.mark.parametrize("masked_grad", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_gradients_equal_the_formula(
    dtype: torch.dtype, decay: float, sr_lambda: float, masked_grad: bool, as_tensor: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator).to(dtype).requires_grad_()
    incoming = torch.randn(6, 8, generator=generator).to(dtype)
    mask = nm_mask(weight, 2, 4)
    scale = torch.where(mask, 1.0, decay).to(dtype)
    sparse = ste_prune(weight, mask, torch.tensor(decay) if as_tensor else decay, sr_lambda=sr_lambda, masked_grad=masked_grad)
    sparse.backward(incoming)
    expected = incoming * scale if masked_grad else incoming
    expected = expected + sr_lambda * torch.where(mask, 0.0, weight.detach())
    torch.testing.assert_close(sparse, weight.detach() * scale, rtol=1e-7 if dtype.itemsize > 2 else 1e-2, atol=0)
    torch.testing.assert_close(weight.grad, expected, **({} if dtype.itemsize > 2 else {"rtol": 1e-2, "atol": 1e-3}))


def test_masked_gradient_is_plain_autograd() -> None:
    weight = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    mask = nm_mask(weight, 2, 4)
    assert torch.autograd.gradcheck(lambda w: ste_prune(w, mask, 0.3, masked_grad=True), (weight,))


def test_decay_one_is_the_dense_weight_bit_for_bit() -> None:
    weight = torch.randn(16, 16)
    assert torch.equal(ste_prune(weight, nm_mask(weight, 1, 8), 1.0), weight)


def test_autocast_keeps_the_weight_dtype_and_reaches_pruned_weights() -> None:
    layer = torch.nn.Linear(8, 4)
    mask = nm_mask(layer.weight, 1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sparse = ste_prune(layer.weight, mask)
        out = torch.nn.functional.linear(torch.randn(3, 8), sparse)
    out.float().sum().backward()
    assert (sparse.dtype, out.dtype, layer.weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert layer.weight.grad[~mask].abs().min() > 0


def test_transposed_and_channels_last_weights() -> None:
    for weight in (torch.randn(8, 6).t(), torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)):
        mask = nm_mask(weight, 2, 4, dim=1)
        assert torch.equal(ste_prune(weight, mask.contiguous()), weight * mask)


@pytest.mark.parametrize(
    ("frames", "official"),
    [
        (stepwise_frames(1, 8, 10, 90), [(10, 7, 8), (30, 4, 8), (50, 2, 8), (70, 1, 8)]),
        (stepwise_frames(1, 16, 0, 350), [(0, 15, 16), (70, 8, 16), (140, 4, 16), (210, 2, 16), (280, 1, 16)]),
        (stepwise_frames(2, 4, 0, 100), [(0, 3, 4), (50, 2, 4)]),
        (geometric_frames(1, 8, 0, 100), [(0, 8, 64), (25, 4, 32), (50, 2, 16), (75, 1, 8)]),
        (geometric_frames(2, 4, 17, 315), [(17, 16, 32), (91, 8, 16), (166, 4, 8), (240, 2, 4)]),
    ],
)
def test_official_frames(frames: list, official: list) -> None:
    assert frames == official


@given(st.integers(2, 64), st.data(), st.integers(0, 1000), st.integers(1, 1000))
def test_frames_end_on_the_target(m: int, data, start: int, length: int) -> None:
    n = data.draw(st.integers(1, m))
    stepwise, geometric = (make(n, m, start, start + length) for make in (stepwise_frames, geometric_frames))
    for frames in (stepwise, geometric):
        starts = [frame[0] for frame in frames]
        assert frames[-1][1:] == (n, m)
        assert starts[0] == start
        assert starts == sorted(set(starts))
        assert starts[-1] < start + length
    kept = [frame[1] for frame in stepwise]
    assert kept == sorted(set(kept), reverse=True)
    assert all(frame[1] * m == n * frame[2] for frame in geometric)
